"""Two graphs above and below a mask: what the lower one gives is kept, and nothing else is changed by that."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meerkat_mq.core.directions import direction
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import Row, projected_gradient
from meerkat_mq.engines.evaluate import evaluate
from meerkat_mq.engines.prefix import IN_MEMORY, Keep
from meerkat_mq.errors import ModelError, ModelMismatch
from meerkat_mq.tasks.task import Task
from tests.engines import tiny
from tests.engines.onnx.conftest import Bundled, families
from tests.engines.onnx.test_bundle import look, rewrite, vouch
from tests.engines.onnx.test_engine import CLOSE, both, losses, moved
from tests.engines.onnx.test_tasks import TASKS
from tests.engines.test_prefix import ALL, EPS, ROWS

NOTHING = Keep(memory_bytes=0)


def engine_of(bundle: Path, mask: Mask, keep: Keep = IN_MEMORY, task: Task = tiny.TASK) -> Any:
    from meerkat_mq.engines.onnx.engine import OnnxEngine
    from meerkat_mq.engines.onnx.manifest import open_bundle

    return OnnxEngine(open_bundle(bundle), mask, task, 1, keep)


def below(engine: Any) -> list[int]:
    """Grows with each run of the lower graph, by its tokens."""
    calls, session = list[int](), engine._body._below
    run = session.run

    def counted(inputs: dict[str, Any]) -> Any:
        calls.append(len(inputs["embedded"]))
        return run(inputs)

    session.run = counted
    return calls


def steps(engine: Any, mask: Mask, batches: Sequence[Sequence[Row]]) -> list[float]:
    """g and loss of a step on each batch."""
    found: list[float] = []
    for seed, rows in enumerate(batches):
        z = direction("mk1", seed, 0, mask.size)
        found += projected_gradient(engine, mask.theta_0, z, EPS, engine.prepare(rows))
    return found


@pytest.mark.parametrize("family", families())
def test_every_family_gives_the_losses_of_pytorch(bundled: Bundled, family: str) -> None:
    made = bundled(f"{family}-upper")
    assert {next(part for part in m.name.split(".") if part.isdigit()) for m in made[2].matrices} == {"1"}
    ours, theirs = both(made)
    calls = below(ours)
    for theta in (made[2].theta_0, moved(made[2]), made[2].theta_0):
        np.testing.assert_allclose(losses(ours, theta, ROWS), losses(theirs, theta, ROWS), rtol=0, atol=CLOSE)
    seen = len(calls)
    losses(ours, made[2].theta_0, ROWS[::-1])
    assert len(calls) == seen > 0


@pytest.mark.parametrize("weights", ["float16", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_steps_agree_with_those_of_pytorch(bundled: Bundled, family: str, weights: Any) -> None:
    made = bundled(f"{family}-upper", weights)
    twice = [*ALL, *ALL[::-1]]  # the second time, all states were kept, of passes with other rows beside
    wanted = steps(both(made)[1], made[2], twice)
    for keep in (IN_MEMORY, NOTHING):
        np.testing.assert_allclose(steps(engine_of(*made[1:], keep), made[2], twice), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["choice", "completion", "text"])
def test_tasks_of_other_kinds(bundled: Bundled, name: str) -> None:
    task, rows = TASKS[name]
    made = bundled("llama-upper", "int8")
    ours, theirs = both(made, task)
    for _ in range(2):
        for theta in (made[2].theta_0, moved(made[2])):
            np.testing.assert_allclose(losses(ours, theta, rows), losses(theirs, theta, rows), rtol=0, atol=CLOSE)
    figures = [evaluate(engine, rows, 2, task.evaluation).figures for engine in (ours, theirs)]
    assert figures[0] == pytest.approx(figures[1], abs=1e-3)


def test_both_sides_of_a_step_share_what_nothing_keeps(bundled: Bundled) -> None:
    _, bundle, mask = bundled("llama-upper")
    engine = engine_of(bundle, mask, NOTHING)
    calls, plain = below(engine), steps(engine_of(bundle, mask), mask, [ROWS[:4]])
    assert steps(engine, mask, [ROWS[:4]]) == plain
    assert len(calls) == 1
    steps(engine, mask, [ROWS[:4]])
    assert len(calls) == 2
    assert calls[0] == calls[1]


def test_only_texts_that_are_new_are_computed(bundled: Bundled) -> None:
    _, bundle, mask = bundled("llama-upper")
    engine = engine_of(bundle, mask)
    calls = below(engine)
    losses(engine, mask.theta_0, ROWS[:2])
    losses(engine, mask.theta_0, ROWS[:6])
    alone = engine_of(bundle, mask)
    others = below(alone)
    losses(alone, mask.theta_0, ROWS[2:6])
    assert sum(calls[1:]) == sum(others)


def test_states_outlive_the_process_and_no_other_model_has_them(bundled: Bundled, tmp_path: Path) -> None:
    _, bundle, mask = bundled("llama-upper", "int8")
    keep = Keep(0, 1 << 20, tmp_path)
    first = steps(engine_of(bundle, mask, keep), mask, [ROWS[:6]])
    again = engine_of(bundle, mask, keep)
    calls = below(again)
    assert steps(again, mask, [ROWS[:6]]) == first
    assert not calls
    (folder,) = tmp_path.iterdir()
    engine_of(*bundled("llama-upper", "int4")[1:], keep)
    assert not folder.exists()


def test_a_mask_of_other_weights_is_refused(bundled: Bundled) -> None:
    with pytest.raises(ModelMismatch, match=r"layers\.0\..* has shape .*, and the bundle does not train it"):
        engine_of(bundled("llama-upper")[1], bundled("llama")[2])


def other_graph(bundle: Path) -> None:
    """One that asks for what a lower graph is not given."""
    shutil.copy(bundle / "graph.onnx", bundle / "prefix.onnx")
    vouch(bundle, "prefix.onnx")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda folder: (folder / "prefix.onnx").write_bytes(b"x"), r"prefix\.onnx: is not the file that bundle\.json"),
        (lambda folder: rewrite(folder, lambda t: t.pop("frozen")), r"bundle\.json: frozen: is 0, and prefix\.onnx is"),
        (lambda folder: rewrite(folder, lambda t: t["files"].pop("prefix.onnx")), r"files: does not name prefix\.onnx"),
        (lambda folder: rewrite(folder, lambda t: t.update(frozen=-1)), r"bundle\.json: frozen"),
    ],
)
def test_a_bundle_whose_parts_do_not_fit(
    bundled: Bundled, tmp_path: Path, change: Callable[[Path], Any], problem: str
) -> None:
    folder = Path(shutil.copytree(bundled("llama-upper")[1], tmp_path / "bundle"))
    look(folder)
    change(folder)
    with pytest.raises(ModelError, match=problem):
        look(folder)


def test_a_lower_graph_that_is_none(bundled: Bundled, tmp_path: Path) -> None:
    mask = bundled("llama-upper")[2]
    folder = Path(shutil.copytree(bundled("llama-upper")[1], tmp_path / "bundle"))
    other_graph(folder)
    with pytest.raises(ModelError, match=r"prefix\.onnx: is not taken by ONNX Runtime"):
        losses(engine_of(folder, mask), mask.theta_0, ROWS[:2])
