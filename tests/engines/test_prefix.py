"""A frozen prefix: what is computed once a row gives what a plain path gives, and is bounded in memory and on disk."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from meerkat_mq.core.directions import direction
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import projected_gradient
from meerkat_mq.engines.evaluate import evaluate
from meerkat_mq.engines.prefix import IN_MEMORY, HiddenStates, Keep
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import LoadedModel, load_model
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.tasks.completion import Completion
from tests.engines import tiny

Load = Callable[..., LoadedModel]
NAMES = ("llama", "gpt2", "bert")
EPS = 0.1  # the last bits of a loss are 1e-5 of g, then; at 1e-3 they are 1e-3, with or without a prefix
LENGTHS = (60, 7, 33, 18, 45, 3)  # characters of the rows, so that a pass is padded
ROWS = [
    {"line": text[:length], "label": n % 2}
    for n, (text, length) in enumerate(zip(tiny.TEXTS, LENGTHS * 12, strict=True))
]
ALL: list[list[dict[str, Any]]] = [ROWS[:6], ROWS[4:12], ROWS[1:9:2], ROWS[::5], ROWS[:1], ROWS[8:12]]


@pytest.fixture(scope="session")
def above(folders: dict[str, Path], _own_cache: None) -> dict[str, Mask]:
    """A mask of each tiny model's second block."""
    settings: dict[str, Any] = {"density": 0.1, "from_layer": 1, "sequences": 4, "length": 32}
    return {name: make_mask(load_model(folders[name]), tiny.TEXTS, "magnitude", **settings) for name in NAMES}


def pair(load: Load, mask: Mask, name: str, keep: Keep = IN_MEMORY, task: Any = tiny.TASK) -> list[TransformersEngine]:
    """A plain engine, and one with a prefix."""
    return [TransformersEngine(load(name), mask, task, where) for where in (None, keep)]


def below(engine: TransformersEngine) -> list[int]:
    """Grows by one with each pass through the first block."""
    assert engine.prefix is not None
    calls: list[int] = []
    layer = next(module for module in engine.prefix.blocks[0].modules() if not list(module.children()))
    layer.register_forward_hook(lambda *_: calls.append(1))
    return calls


def steps(engine: TransformersEngine, mask: Mask, batches: Sequence[Sequence[dict[str, Any]]]) -> list[float]:
    """g and loss of a step on each batch."""
    found: list[float] = []
    for seed, rows in enumerate(batches):
        z = direction("mk1", seed, 0, mask.size)
        found += projected_gradient(engine, mask.theta_0, z, EPS, engine.prepare(rows))
    return found


SAY = Completion(name="say", template="What of it?", completion=" {line}", fields=("line",), max_tokens=48)


@pytest.mark.parametrize("name", NAMES)
def test_steps_agree_with_those_of_whole_passes(load: Load, above: dict[str, Mask], name: str) -> None:
    plain, frozen = pair(load, above[name], name)
    calls = below(frozen)
    twice = [*ALL, *ALL[::-1]]  # the second time, all states were kept, of passes with other rows beside
    wanted, found = steps(plain, above[name], twice), steps(frozen, above[name], twice)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    seen = len(calls)
    assert seen <= len(ALL) + (name == "bert")  # whose descriptions are a pass of their own
    steps(frozen, above[name], ALL[:2])
    assert len(calls) == seen


@pytest.mark.parametrize("name", NAMES)
def test_first_passes_have_the_same_bits(load: Load, above: dict[str, Mask], name: str) -> None:
    plain, frozen = pair(load, above[name], name)
    assert frozen.prefix is not None
    frozen.prefix._narrow = []
    assert steps(frozen, above[name], ALL[:1]) == steps(plain, above[name], ALL[:1])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_evaluations(load: Load, above: dict[str, Mask], name: str) -> None:
    plain, frozen = pair(load, above[name], name)
    calls = below(frozen)
    for engine in (plain, frozen):
        engine.write(above[name].theta_0 + np.float32(0.01))
    batches = [(engine, engine.prepare(ROWS[:6])) for engine in (plain, frozen)]
    for _ in range(2):
        (wanted, loss), (found, other) = (engine.gradient(batch) for engine, batch in batches)
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6)
        assert other == pytest.approx(loss, abs=1e-6)
    first, *others = (evaluate(engine, ROWS[:12], 4) for engine in (plain, frozen, frozen))
    for figures in others:
        assert figures.figures == pytest.approx(first.figures, abs=1e-5)
    seen = len(calls)
    evaluate(frozen, ROWS[:12], 5)
    assert len(calls) == seen


def test_texts_to_be_learned(load: Load, above: dict[str, Mask]) -> None:
    plain, frozen = pair(load, above["llama"], "llama", task=SAY)
    wanted, found = (steps(engine, above["llama"], [*ALL, *ALL]) for engine in (plain, frozen))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llama", {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt2", {"c_proj", "c_fc"}),
        ("bert", set()),
    ],
)
def test_the_last_block_computes_only_positions_that_are_needed(
    load: Load, above: dict[str, Mask], name: str, layers: set[str]
) -> None:
    engine = pair(load, above[name], name)[1]
    assert engine.prefix is not None
    names = {id(module): path.rpartition(".")[2] for path, module in engine.loaded.model.named_modules()}
    narrow = engine.prefix._narrow
    assert {names[id(layer)] for layer in narrow} == layers
    shapes: set[int] = set()
    for layer in engine.prefix._narrow:
        layer.forward = _noting(layer.forward, shapes)
    batch = engine.prepare(ROWS[:1])
    engine.losses(batch)
    assert shapes == ({batch.passes[0].positions.shape[1]} if layers else set())


def _noting(forward: Callable[..., torch.Tensor], lengths: set[int]) -> Callable[..., torch.Tensor]:
    def noting(hidden: torch.Tensor) -> torch.Tensor:
        lengths.add(hidden.shape[1])
        return forward(hidden)

    return noting


def test_a_batch_shares_its_prefix_also_where_nothing_is_kept(load: Load, above: dict[str, Mask]) -> None:
    frozen = pair(load, above["llama"], "llama", Keep(memory_bytes=0))[1]
    calls = below(frozen)
    with capture_logs() as logs:
        steps(frozen, above["llama"], [ROWS[:6], ROWS[:6]])
    assert len(calls) == 2
    assert [line["event"] for line in logs] == ["no room for more hidden states: the other rows are computed anew"]


def test_preparing_rows_computes_nothing(load: Load, above: dict[str, Mask]) -> None:
    frozen = pair(load, above["llama"], "llama")[1]
    calls = below(frozen)
    assert frozen.usable(ROWS) == ROWS
    assert not calls


def test_from_disk(load: Load, above: dict[str, Mask], tmp_path: Path) -> None:
    keep, mask = Keep(0, 1 << 20, tmp_path / "prefix"), above["llama"]
    plain, first = pair(load, mask, "llama", keep)
    wanted = steps(first, mask, ALL)
    files = [file for file in (tmp_path / "prefix").rglob("*") if file.is_file()]
    assert len(files) >= len({row["line"] for rows in ALL for row in rows})
    second = pair(load, mask, "llama", keep)[1]
    calls = below(second)
    np.testing.assert_allclose(steps(second, mask, ALL), wanted, rtol=1e-5, atol=1e-5)
    assert not calls
    for number, file in enumerate(sorted(files)):  # torn, changed, emptied
        data = file.read_bytes()
        file.write_bytes((data[:-1], data[:-1] + bytes([data[-1] ^ 1]), b"")[number % 3])
    np.testing.assert_allclose(steps(second, mask, ALL), steps(plain, mask, ALL), rtol=1e-5, atol=1e-5)
    assert calls


def test_a_model_that_is_not_understood_computes_whole_passes(load: Load, above: dict[str, Mask]) -> None:
    loaded = [load("llama"), load("llama")]
    for each in loaded:
        _second_block_looks_into_the_first(each)
    with capture_logs() as logs:
        plain, frozen = (
            TransformersEngine(each, above["llama"], tiny.TASK, keep)
            for each, keep in zip(loaded, (None, IN_MEMORY), strict=True)
        )
    assert frozen.prefix is None
    (line,) = logs
    assert line["event"] == "no frozen prefix: each pass computes all blocks"
    assert line["problem"] == "LlamaForCausalLM: passes that go on from block 1 differ from whole ones"
    assert steps(plain, above["llama"], ALL[:2]) == steps(frozen, above["llama"], ALL[:2])


def _second_block_looks_into_the_first(loaded: LoadedModel) -> None:
    first, second = loaded.model.model.layers
    seen: list[torch.Tensor] = []
    first.mlp.register_forward_hook(lambda _, __, output: seen.append(output))
    second.register_forward_hook(lambda _, __, output: output + seen[-1][: len(output), : output.shape[1]])


def test_a_mask_of_all_blocks_has_none(load: Load, masks: dict[str, Mask]) -> None:
    with capture_logs() as logs:
        assert all(TransformersEngine(load(name), masks[name], tiny.TASK).prefix is None for name in NAMES)
    assert not logs


def test_half_precision(load: Load, above: dict[str, Mask]) -> None:
    engines = [
        TransformersEngine(load("llama", dtype="bfloat16"), above["llama"], tiny.TASK, k) for k in (None, IN_MEMORY)
    ]
    calls = below(engines[1])
    for _ in range(2):
        wanted, found = (engine.losses(engine.prepare(ROWS[:6])) for engine in engines)
        np.testing.assert_allclose(found, wanted, rtol=0.02, atol=0.02)
    assert len(calls) == 1


def test_an_adapter(load: Load) -> None:
    mask = make_mask(load("llama"), tiny.TEXTS, "lora", rank=2, from_layer=1, sequences=4, length=32)
    plain, frozen = pair(load, mask, "llama")
    assert frozen.prefix is not None
    np.testing.assert_allclose(steps(frozen, mask, ALL), steps(plain, mask, ALL), rtol=1e-5, atol=1e-5)


TOKENS = [np.arange(n, n + size, dtype=np.int64) for n, size in enumerate((3, 5, 3, 8))]


def state(tokens: np.ndarray) -> np.ndarray:
    return np.repeat(tokens[:, None].astype(np.int32), 4, axis=1)


def filled(keep: Keep, context: bytes = b"a") -> HiddenStates:
    store = HiddenStates(keep, context, np.int32, 4)
    for tokens in TOKENS:
        store.keep(tokens, state(tokens))
    return store


def known(store: HiddenStates) -> list[bool]:
    found = [store.find(tokens) for tokens in TOKENS]
    assert all(each is None or np.array_equal(each, state(t)) for each, t in zip(found, TOKENS, strict=True))
    return [each is not None for each in found]


def test_memory_is_bounded_and_nothing_is_dropped_for_another(tmp_path: Path) -> None:
    assert known(filled(Keep(3 * 4 * 4 + 5 * 4 * 4 + 400))) == [True, True, False, False]
    assert known(filled(IN_MEMORY)) == [True] * 4


def test_disk_is_bounded_and_belongs_to_one_context(tmp_path: Path) -> None:
    folder = tmp_path / "prefix"
    keep = Keep(0, 16 * (3 + 5 + 3) + 3 * 16, folder)
    assert known(filled(keep)) == [True, True, True, False]
    assert known(HiddenStates(keep, b"a", np.int32, 4)) == [True, True, True, False]
    assert sum(known(HiddenStates(Keep(0, 130, folder), b"a", np.int32, 4))) in (1, 2)  # what is over the limit goes
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 130
    assert known(HiddenStates(keep, b"b", np.int32, 4)) == [False] * 4
    assert len(list(folder.iterdir())) == 1
    HiddenStates(Keep(0, 0, folder), b"b", np.int32, 4)
    assert not list(folder.iterdir())


def test_a_disk_that_fails_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with capture_logs() as logs:
        assert known(filled(Keep(0, 1 << 20, tmp_path / "file" / "prefix"))) == [False] * 4
    assert [line["event"] for line in logs if line["log_level"] == "warning"] == ["hidden states are not kept on disk"]
    assert known(filled(Keep(1 << 20, 1 << 20, tmp_path / "file" / "prefix"))) == [True] * 4
