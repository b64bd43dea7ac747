"""Damaged ONNX files of a user's own model: a node computes something with them, or refuses them in one line."""

import contextlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from meerkat_mq.engines.protocol import Setup
from meerkat_mq.engines.registry import make_engine, usable
from meerkat_mq.errors import DataError
from tests.engines.onnx.test_graph import NEEDS_ONNX, ROWS, graph, module_of_page
from tests.fuzz.mutate import COUNT
from tests.fuzz.mutate_bytes import damaged
from tests.fuzz.refusals import read_or_refused

pytestmark = NEEDS_ONNX


@pytest.mark.timeout(60 + COUNT)
def test_damaged_graphs(tmp_path: Path) -> None:
    page, file, seen = module_of_page(tmp_path), tmp_path / "windows.onnx", Counter[str]()
    mask, sample = page.Windows.mask(), graph(page.Network()).SerializeToString()

    def use() -> None:
        engine = make_engine("graph", Setup(mask, model=str(file), threads=1), "a test")
        with contextlib.suppress(DataError), np.errstate(all="ignore"):  # an input of another name: no row fits
            usable(engine, ROWS)

    for number in range(COUNT):
        file.write_bytes(damaged("graph", [sample], number))
        seen["read" if read_or_refused(use, file, number) is None else "refused"] += 1
    assert seen["refused"] > COUNT // 5, "the damage does nothing"
    assert seen["read"] > 0, "no damage is small"
