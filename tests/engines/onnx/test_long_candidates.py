"""The same without PyTorch: passes stay bounded, and losses are PyTorch's."""

from typing import Any

import numpy as np
import pytest

from meerkat_mq.engines import prompts
from tests.engines.onnx.conftest import Bundled
from tests.engines.onnx.test_engine import CLOSE, both, losses
from tests.engines.test_long_candidates import LABELS, LIMIT, ROWS, TASKS


@pytest.mark.parametrize("name", TASKS)
def test_runs_are_bounded_and_losses_are_those_of_pytorch(
    bundled: Bundled, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    task, rows = TASKS[name]
    made = bundled("llama", "int8")
    ours, theirs = both(made, task)
    monkeypatch.setattr("meerkat_mq.engines.onnx.engine._PASS_TOKENS", LIMIT)
    assert max(one.lines.ids.size for one in ours.prepare(rows).passes) <= prompts.WORTH * LIMIT
    found, wanted = losses(ours, made[2].theta_0, rows), losses(theirs, made[2].theta_0, rows)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("together", [LIMIT, 3300])
def test_descriptions_and_texts_go_together_as_long_as_they_fit(
    bundled: Bundled, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr(prompts, "TOGETHER", together)
    made = bundled("bert")
    ours, theirs = both(made, LABELS)
    sizes = list[int]()
    run = ours._body._above.run

    def counted(inputs: dict[str, Any]) -> Any:
        sizes.append(inputs["spread"].size)
        return run(inputs)

    ours._body._above.run = counted
    found, wanted = losses(ours, made[2].theta_0, ROWS), losses(theirs, made[2].theta_0, ROWS)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=CLOSE)
    assert max(sizes) <= max(together, 768)
