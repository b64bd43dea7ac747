"""The engine of ONNX Runtime against PyTorch's: the same losses at every theta, for every kind of task and model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import Row, projected_gradient
from meerkat_mq.engines.evaluate import evaluate
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.errors import DataError, ModelMismatch, TaskError
from meerkat_mq.tasks.classification import Classification
from meerkat_mq.tasks.task import Task
from tests.engines import tiny
from tests.engines.onnx.conftest import Bundled, families
from tests.tasks.test_kinds import Quiz

CLOSE = 2e-5
WEIGHTS = ["float32", "float16", "int8", "int4"]


def words(*label_words: str) -> Classification:
    return tiny.TASK.model_copy(update={"label_words": label_words, "descriptions": label_words})


def both(made: tuple[Path, Path, Mask], task: Task = tiny.TASK) -> tuple[Any, TransformersEngine]:
    from meerkat_mq.engines.onnx.engine import OnnxEngine
    from meerkat_mq.engines.onnx.manifest import open_bundle

    base, folder, mask = made
    ours, theirs = OnnxEngine(open_bundle(folder), mask, task, 1), TransformersEngine(load_model(base), mask, task)
    ours.check(mask)
    theirs.check(mask)
    return ours, theirs


def moved(mask: Mask, seed: int = 1, eps: float = 0.05) -> Float32Array:
    return mask.theta_0 + np.float32(eps) * direction("mk1", seed, 0, mask.size)


def losses(engine: Any, theta: Float32Array, rows: Sequence[Row]) -> Float32Array:
    engine.write(theta)
    found: Float32Array = engine.losses(engine.prepare(rows))
    return found


@pytest.mark.parametrize("family", families())
def test_every_family_gives_the_losses_of_pytorch(bundled: Bundled, family: str) -> None:
    made = bundled(family)
    ours, theirs = both(made)
    for theta in (made[2].theta_0, moved(made[2])):
        found, wanted = losses(ours, theta, tiny.ROWS), losses(theirs, theta, tiny.ROWS)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_kind_of_weights_is_exactly_its_base(bundled: Bundled, family: str, weights: str) -> None:
    made = bundled(family, weights)
    ours, theirs = both(made)
    found, wanted = losses(ours, moved(made[2]), tiny.ROWS), losses(theirs, moved(made[2]), tiny.ROWS)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_projected_gradients_agree(bundled: Bundled, weights: str) -> None:
    made = bundled("llama", weights)
    engines = both(made)
    mask, rows = made[2], tiny.ROWS[:16]
    found = [
        [projected_gradient(engine, mask.theta_0, direction("mk1", seed, 0, mask.size), 1e-2, engine.prepare(rows))[0]
         for seed in range(20)]
        for engine in engines
    ]  # fmt: skip
    assert np.corrcoef(found[0], found[1])[0][1] > 0.9999
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-2 * float(np.abs(found[1]).max()))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_what_is_written_is_never_ignored(bundled: Bundled, family: str, weights: str) -> None:
    """A runtime that keeps copies of weights would go on with theta_0, and say nothing."""
    made = bundled(family, weights)
    ours, theirs = both(made)
    mask, rows = made[2], tiny.ROWS[:4]
    before = losses(ours, mask.theta_0, rows)
    for matrix, part in mask.slices():
        theta = mask.theta_0
        theta[part] += np.float32(0.5)
        found = losses(ours, theta, rows)
        assert np.abs(found - before).max() > 1e-4, matrix.name
        np.testing.assert_allclose(found, losses(theirs, theta, rows), rtol=0, atol=CLOSE, err_msg=matrix.name)
    np.testing.assert_array_equal(losses(ours, mask.theta_0, rows), before)  # and nothing is left of it


def test_theta_is_copied_and_what_does_not_fit_is_refused(bundled: Bundled) -> None:
    made = bundled("llama")
    ours, _ = both(made)
    theta = moved(made[2])
    ours.write(theta)
    batch = ours.prepare(tiny.ROWS[:3])
    before = ours.losses(batch)
    theta[:] = 0
    np.testing.assert_array_equal(ours.losses(batch), before)
    for wrong in (theta[1:], theta.astype(np.float64)):
        with pytest.raises(ValueError, match=r"not float32 \("):
            ours.write(wrong)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "task",
    [
        words(" broken", " running"),
        words(" broken and gone", " ok"),
        words(" broken and gone", " broken and", " broken"),
    ],
    ids=["like", "unlike", "nested"],
)
def test_label_words_of_any_number_of_tokens(bundled: Bundled, family: str, task: Classification) -> None:
    made = bundled(family)
    ours, theirs = both(made, task)
    for engine in (ours, theirs):
        engine.write(moved(made[2]))
    batches = ours.prepare(tiny.ROWS), theirs.prepare(tiny.ROWS)
    (found, answers), (wanted, right) = ours.scores(batches[0]), theirs.scores(batches[1])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=CLOSE)
    np.testing.assert_array_equal(answers, right)
    np.testing.assert_allclose(ours.losses(batches[0]), theirs.losses(batches[1]), rtol=0, atol=CLOSE)
    figures = [evaluate(engine, tiny.ROWS, 16, task.evaluation).figures for engine in (ours, theirs)]
    assert figures[0] == pytest.approx(figures[1], abs=CLOSE)


@pytest.mark.parametrize(
    "options", [[[" on", " off again", " gone"], [" red", " blue"]], [[" done, and well done"]] * 2]
)
def test_candidates_of_a_row_s_own(bundled: Bundled, options: list[list[str]]) -> None:
    made = bundled("llama")
    ours, theirs = both(made, Quiz(name="quiz"))
    rows = [
        {"question": f"{text} What?", "options": own, "right": 0}
        for text, own in zip(tiny.TEXTS, options, strict=False)
    ]
    found, wanted = losses(ours, moved(made[2]), rows), losses(theirs, moved(made[2]), rows)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=CLOSE)


def test_long_and_empty_rows_and_those_that_cannot_be_prepared(bundled: Bundled) -> None:
    for family in ("llama", "bert"):
        made = bundled(family)
        ours, theirs = both(made)
        rows = [{"line": text, "label": 0} for text in ("", "x", tiny.TEXTS[0] * 9)]
        np.testing.assert_allclose(
            losses(ours, made[2].theta_0, rows), losses(theirs, made[2].theta_0, rows), rtol=0, atol=CLOSE
        )
        assert ours.usable([*rows, {"line": "x"}]) == rows
        assert len(ours.losses(ours.prepare([*rows, {"line": "x"}]))) == 3
        with pytest.raises(DataError):
            ours.prepare([{"line": "x"}])
        assert ours.kinds(made[2]) == theirs.kinds(made[2])


def test_another_mask_of_the_same_matrices_is_served_too(bundled: Bundled) -> None:
    from meerkat_mq.engines.torch.masks import make_mask

    base, folder, mask = bundled("llama")
    other = make_mask(load_model(base), tiny.TEXTS, "random", density=0.03, seed=5, **tiny.SMALL)
    fewer = Mask(other.matrices[3:], mask.fingerprint, mask.tokenizer_fingerprint)
    ours, theirs = both((base, folder, fewer))
    found, wanted = losses(ours, moved(fewer), tiny.ROWS), losses(theirs, moved(fewer), tiny.ROWS)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=CLOSE)


def test_a_mask_that_is_not_the_bundle_s_is_refused(bundled: Bundled) -> None:
    from meerkat_mq.engines.onnx.engine import OnnxEngine
    from meerkat_mq.engines.onnx.manifest import open_bundle

    _, folder, mask = bundled("llama")
    bundle = open_bundle(folder)
    for other, problem in (
        (Mask(mask.matrices, bytes(32), mask.tokenizer_fingerprint), "of another checkpoint: fingerprint"),
        (Mask(mask.matrices, mask.fingerprint, bytes(32)), "of another tokenizer: fingerprint"),
        (Mask.whole({"model.norm.weight": np.ones(32)}), r"shape \(32,\), and the bundle does not train it"),
        (Mask.whole({mask.matrices[0].name: np.ones((2, 2))}), r"shape \(2, 2\), and the bundle has \(\d+, \d+\)"),
    ):
        with pytest.raises(ModelMismatch, match=problem):
            OnnxEngine(bundle, other, tiny.TASK).check(other)
    for weights in WEIGHTS:
        _, folder, mask = bundled("llama", weights)
        matrix = mask.matrices[1]
        theta_0 = matrix.theta_0.copy()
        theta_0[:2] += 1
        changed = type(matrix)(matrix.name, matrix.shape, matrix.indices, theta_0, matrix.g_p)
        other = Mask((changed,), mask.fingerprint, mask.tokenizer_fingerprint)
        with pytest.raises(ModelMismatch, match=f"2 of {theta_0.size} masked weights of {matrix.name} differ"):
            OnnxEngine(open_bundle(folder), other, tiny.TASK).check(other)


def test_inputs_that_the_graph_does_not_take_are_refused(bundled: Bundled) -> None:
    from dataclasses import replace

    from meerkat_mq.engines.onnx.engine import OnnxEngine
    from meerkat_mq.engines.onnx.manifest import open_bundle

    _, folder, mask = bundled("gemma2")
    bundle = open_bundle(folder)
    assert bundle.manifest.positions == 64
    narrow = replace(bundle, manifest=bundle.manifest.model_copy(update={"positions": 40}))
    with pytest.raises(TaskError, match=r"^task state: max_tokens: 48 tokens are more than the 40 of this bundle's"):
        OnnxEngine(narrow, mask, tiny.TASK)
