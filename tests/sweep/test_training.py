from collections.abc import Callable
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.path import digest
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.toy import QuadraticEngine, toy_mask
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.sweep.training import Trained, train_federated

MASK = toy_mask(8)
COUNT, NODES = 5, 3


class OutOfMemory(RuntimeError):
    """What an engine's library raises."""


class FailingEngine(QuadraticEngine):
    """Fails at its ninth forward pass."""

    def __init__(self) -> None:
        super().__init__(MASK.size)
        self.passes = 0

    def losses(self, batch: Any) -> Float32Array:
        self.passes += 1
        if self.passes == 9:
            raise OutOfMemory("no memory left")
        return super().losses(batch)


def trained(engine: QuadraticEngine, report: Callable[[float], None]) -> Trained:
    settings = RoundSettings(
        run_id=bytes(range(16)),
        mask_hash=MASK.hash,
        count=COUNT,
        digest_every=COUNT,
        local_steps=1,
        directions=1,
        lr=0.1,
        eps=1e-3,
        batch_size=1,
        min_nodes=NODES,
        fraction=1.0,
        quorum=1.0,
        deadline_s=60.0,
        grace_s=0.0,
    )
    shards = [[{"seed": number}] for number in range(NODES)]
    return train_federated(cast("TransformersEngine", engine), MASK, shards, settings, report=report)


def test_what_training_comes_to_and_costs() -> None:
    shares = list[float]()
    with capture_logs() as logs:
        found = trained(QuadraticEngine(MASK.size), shares.append)
    assert logs == []  # drivers of services would say who is in charge
    assert (found.rounds, found.passes, found.refused, found.ended) == (COUNT, 2 * NODES * COUNT, 0, None)
    assert digest(found.theta) != digest(MASK.theta_0)
    assert found.bytes_up == COUNT * 52
    assert found.bytes_down > COUNT * 52
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(shares) == NODES * COUNT


def test_what_an_engine_raises_ends_the_cell_by_its_name() -> None:
    with pytest.raises(OutOfMemory, match="no memory left"):
        trained(FailingEngine(), lambda share: None)
