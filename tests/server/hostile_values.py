"""`python -m tests.server.hostile_values`: a values node that sends something else than its displacement.

MEERKAT_HOSTILE says what: "× -3", that many times its displacement; "= 10", that number in every weight.
"""

import os
from typing import Any

import numpy as np
import typer

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.first_order import first_order_steps
from meerkat_mq.node.__main__ import command
from meerkat_mq.runtime import model


def hostile_steps(*args: Any) -> tuple[Float32Array, float, int]:
    """What it sends, with the loss and steps of an honest node."""
    values, loss, steps = first_order_steps(*args)
    how, number = os.environ["MEERKAT_HOSTILE"].split()
    sent = np.float32(number) * (values if how == "×" else np.ones_like(values))
    return sent.astype(np.float32), loss, steps


if __name__ == "__main__":
    model.first_order_steps = hostile_steps  # type: ignore[assignment, attr-defined]
    typer.run(command)
