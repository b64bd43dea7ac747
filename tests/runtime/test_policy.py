"""The node's own policy: every key, judged in the driver; what is refused is said, and the next run is looked at."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from meerkat_mq.config import PolicyConfig
from meerkat_mq.core import metrics as m
from meerkat_mq.errors import PolicyRefused, TaskError
from meerkat_mq.node.state import NodeState
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.runtime.abstention import AGAIN_S
from meerkat_mq.runtime.model import Spent
from meerkat_mq.runtime.policy import DEFAULTS, NodePolicy
from meerkat_mq.runtime.steps import Sequence
from meerkat_mq.tasks.load import load_task
from meerkat_mq.wire.descriptor import RunDescriptor
from tests.runtime.one_node import PaperModel
from tests.runtime.one_server import MASK, ONE, TWO, Server
from tests.runtime.ports import StepWorker, VirtualClock

GENUINE = ONE.model_copy(
    update={"engine": "transformers", "task": load_task("sst2").describe(), "batch_size": 16, "eps": 1e-3, "lr": 0.1}
)
LARGE = 2**26


@pytest.fixture(autouse=True)
def logs() -> Iterator[None]:
    with capture_logs():
        yield


def run(**changes: Any) -> RunDescriptor:
    return GENUINE.model_copy(update=changes)


# Of each key: what a node with this policy refuses, and what it takes.
KEYS: dict[str, tuple[dict[str, Any], RunDescriptor, RunDescriptor]] = {
    "mask": ({"mask": "a" * 32}, run(), run(mask="a" * 32)),
    "max_weights": ({}, run(weights=LARGE), run(weights=2**22)),
    "max_mask_bytes": (
        {"max_weights": LARGE, "max_mask_bytes": 1200},
        run(weights=101),
        run(weights=100, mask_bytes=9),
    ),
    "tasks": ({"tasks": ["agnews", "sst2"]}, run(task=load_task("rte").describe()), run()),
    "min_batch": ({}, run(batch_size=3), run(batch_size=4)),
    "max_local_steps": ({"max_local_steps": 10}, run(local_steps=11), run(local_steps=10)),
    "min_eps": ({"min_eps": 1e-4}, run(eps=9e-5), run(eps=1e-4)),
    "max_eps": ({}, run(eps=1.1), run(eps=1.0)),
    "min_lr": ({"min_lr": 1e-5}, run(lr=1e-6), run(lr=1e-5)),
    "max_lr": ({}, run(lr=11.0), run(lr=10.0)),
}
ELSEWHERE = {"kinds", "max_directions"}  # judged by the model, and round by round: below


def test_each_key_is_walked() -> None:
    assert KEYS.keys() | ELSEWHERE == PolicyConfig.model_fields.keys()


@pytest.mark.parametrize("key", KEYS)
def test_a_run_beyond_a_key_is_refused_by_its_name(key: str) -> None:
    settings, refused, taken = KEYS[key]
    policy = NodePolicy.of(PolicyConfig.model_validate(settings))
    with pytest.raises(PolicyRefused, match=rf"^policy\.{key}: .+; change the key in node\.toml only if "):
        policy.check_run(refused)
    policy.check_run(taken)


def test_a_mask_that_is_small_on_the_wire_and_large_in_memory_is_refused() -> None:
    with pytest.raises(PolicyRefused, match=r"max_weights: weights in the run's mask: 67,108,864 is more than"):
        DEFAULTS.check_run(run(weights=LARGE, mask_bytes=24_756))
    with pytest.raises(PolicyRefused, match="max_mask_bytes"):
        DEFAULTS.check_run(run(weights=1000, mask_bytes=2**26 + 1))


def test_a_task_counts_by_what_it_says_not_by_its_name(tmp_path: Path) -> None:
    policy = NodePolicy.of(PolicyConfig(tasks=("sst2",)))
    assert GENUINE.task is not None
    forged = GENUINE.task.model_copy(update={"template": "{sentence} The password is"})
    with pytest.raises(PolicyRefused, match="tasks"):
        policy.check_run(run(task=forged))
    with pytest.raises(PolicyRefused, match="tasks"):
        policy.check_run(run(task=None))
    with pytest.raises(TaskError, match="is no built-in task"):
        NodePolicy.of(PolicyConfig(tasks=("sst3",)))


@pytest.mark.parametrize(("kinds", "refused"), [(["linear"], "embedding"), (["linear", "embedding"], "other")])
def test_kinds_of_weights_are_judged_by_the_nodes_own_model(kinds: list[Any], refused: str) -> None:
    model = PaperModel(GENUINE, MASK, rows=100)
    policy = NodePolicy.of(PolicyConfig(kinds=kinds))
    policy.check_model(GENUINE, model)  # an engine that does not tell
    model.kinds = {"linear": "layers.0.mlp.weight", refused: "a.matrix"}
    with pytest.raises(PolicyRefused, match=rf"policy\.kinds: the run's mask holds a\.matrix, of the kind {refused}"):
        policy.check_model(GENUINE, model)


def test_a_batch_is_its_different_rows() -> None:
    DEFAULTS.check_model(GENUINE, PaperModel(GENUINE, MASK, rows=4))
    with pytest.raises(PolicyRefused, match="different rows of a batch: 3 is less than this node's 4"):
        DEFAULTS.check_model(GENUINE, PaperModel(GENUINE, MASK, rows=3))


# --- directions of a row and a day ---


def admitted(policy: NodePolicy, described: RunDescriptor, state: NodeState, *, steps: int, rows: int = 100) -> bool:
    """Whether so many local steps may be made."""
    clock, done = VirtualClock(), list[object]()
    model = PaperModel(described, MASK, rows=rows)
    order = StartSteps(0, 0, steps, described.eps)
    try:
        Sequence(policy.admit(described, model, order, state, StepWorker(clock)), done.append)
        clock.settle()
    except PolicyRefused as error:
        return error.where != "policy.max_directions"
    assert done == [None]
    return True


def test_directions_of_a_row_are_counted_over_restarts_and_runs(tmp_path: Path) -> None:
    policy = NodePolicy.of(PolicyConfig(max_directions=20))
    with NodeState(tmp_path) as state:
        assert admitted(policy, GENUINE, state, steps=100)  # 2 + 16
        assert not admitted(policy, GENUINE, state, steps=100)
    with NodeState(tmp_path) as state:
        assert not admitted(policy, run(run="2" * 32), state, steps=1)  # 2 more, and 0.16
        assert admitted(policy, GENUINE, state, steps=12)
        assert not admitted(policy, GENUINE, state, steps=1)


def test_many_directions_of_one_batch_are_refused_by_the_default(tmp_path: Path) -> None:
    with NodeState(tmp_path) as state:
        for rows in (8, 12, 1000, 10**6):
            assert not admitted(DEFAULTS, run(perturbations=1000, batch_size=8), state, steps=1, rows=rows)
        assert admitted(DEFAULTS, run(perturbations=10), state, steps=1, rows=1000)


def test_a_day_has_a_count_of_its_own() -> None:
    spent = Spent().then("2026-11-29", "a", 2.0, 5.0, 10.0)
    assert spent == Spent("2026-11-29", 7.0, "a")
    assert spent.then("2026-11-29", "a", 2.0, 3.0, 10.0) == Spent("2026-11-29", 10.0, "a")
    assert spent.then("2026-11-29", "b", 2.0, 2.0, 10.0) is None
    assert spent.then("2026-11-30", "a", 2.0, 8.0, 10.0) == Spent("2026-11-30", 10.0, "a")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"day": 1}', b'{"day": "x", "directions": "y", "run": ""}'])
def test_a_damaged_count_is_said(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "directions.json").write_bytes(data)
    with NodeState(tmp_path) as state, capture_logs() as lines:
        assert state.spend("a", 1.0, 1.0, 2.0)
        assert not state.spend("a", 1.0, 1.0, 2.0)
    assert [line["event"] for line in lines] == ["directions of today are counted anew"]


def test_seeds_of_the_toy_engine_are_nobodys(tmp_path: Path) -> None:
    toy = run(engine="toy", task=None, batch_size=1, perturbations=1000)
    DEFAULTS.check_run(toy)
    with NodeState(tmp_path) as state:
        assert admitted(DEFAULTS, toy, state, steps=1000, rows=1)
    assert not (tmp_path / "directions.json").exists()


# --- in the driver ---


def test_a_node_refuses_a_run_in_words_and_takes_the_next_one() -> None:
    server = Server()
    server.begin(ONE.model_copy(update={"eps": 1e9}))
    assert server.wants == []  # the mask is not fetched
    said = server.statuses[-1]
    assert said.status == "starting"
    assert said.refuses == "policy.max_eps: eps: 1e+09 is more than this node's 1"
    assert server.node.driver.counts[m.REFUSES] == 1
    assert not server.node.machine_is_there
    server.begin(TWO)
    assert server.node.machine_is_there
    assert (server.statuses[-1].status, server.statuses[-1].refuses) == ("online", None)


def test_a_round_with_a_forged_eps_is_refused_and_the_next_one_is_stepped() -> None:
    server = Server()
    server.begin(ONE)
    server.ask(ONE, eps=1e30)
    assert server.node.models[0].stepped == []
    said = server.statuses[-1]
    assert said.status == "starting"
    assert said.refuses is not None
    assert said.refuses.startswith("policy.max_eps: eps: ")
    server.ask(ONE)
    server.node.clock.go(AGAIN_S)
    assert (server.statuses[-1].status, server.statuses[-1].refuses) == ("online", None)
    assert server.node.models[0].stepped == [0]
