"""The node's own policy: every key, judged in the driver; what is refused is said, and the next run is looked at."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from meerkat_mq.config import PolicyConfig
from meerkat_mq.core import metrics as m
from meerkat_mq.core.batches import batch_rows
from meerkat_mq.errors import PolicyRefused, TaskError
from meerkat_mq.node.state import NodeState
from meerkat_mq.rounds.events import StartSteps
from meerkat_mq.runtime.abstention import AGAIN_S, LONGEST_PAUSE_S
from meerkat_mq.runtime.blobs import PATIENCE_S
from meerkat_mq.runtime.model import Spent
from meerkat_mq.runtime.policy import DEFAULTS, NodePolicy, measurements
from meerkat_mq.runtime.steps import Sequence
from meerkat_mq.tasks.load import load_task
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.messages import Offer
from tests.runtime.one_node import Nothing, PaperModel
from tests.runtime.one_server import MASK, ONE, TWO, Server, header
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
    "max_batch": ({}, run(batch_size=1025, engine="toy"), run(batch_size=1024)),
    "max_tokens": ({}, run(task=load_task("sst2").with_limit(2049).describe()), run()),
    "max_local_steps": ({"max_local_steps": 10}, run(local_steps=11), run(local_steps=10)),
    "min_eps": ({"min_eps": 1e-4}, run(eps=9e-5), run(eps=1e-4)),
    "max_eps": ({}, run(eps=1.1), run(eps=1.0)),
    "min_lr": ({"min_lr": 1e-5}, run(lr=1e-6), run(lr=1e-5)),
    "max_lr": ({}, run(lr=11.0), run(lr=10.0)),
}
ELSEWHERE = {"kinds", "max_directions", "max_day_bytes"}  # by the model, and round by round or blob by blob: below


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
    policy = NodePolicy.of(PolicyConfig(max_directions=40))
    with NodeState(tmp_path) as state:
        assert admitted(policy, GENUINE, state, steps=100)  # 2 · (2 + 16): a projected gradient, and a loss
        assert not admitted(policy, GENUINE, state, steps=100)
    with NodeState(tmp_path) as state:
        assert not admitted(policy, run(run="2" * 32), state, steps=1)  # 2 · 2 more, and 2 · 0.16
        assert admitted(policy, GENUINE, state, steps=12)
        assert not admitted(policy, GENUINE, state, steps=1)


def test_many_directions_of_one_batch_are_refused_by_the_default(tmp_path: Path) -> None:
    with NodeState(tmp_path) as state:
        for rows in (8, 12, 1000, 10**6):
            assert not admitted(DEFAULTS, run(perturbations=1000, batch_size=8), state, steps=1, rows=rows)
        assert admitted(DEFAULTS, run(perturbations=10), state, steps=1, rows=1000)


@pytest.mark.parametrize("updates", [1, 1000])
@pytest.mark.parametrize("perturbations", [1, 3])
def test_no_row_gives_more_numbers_than_are_counted(perturbations: int, updates: int) -> None:
    """Of each update, what a server gets: K projected gradients for each batch that holds the row, and the loss."""
    described, rows, steps = run(perturbations=perturbations, batch_size=3), 7, 4
    got: Counter[int] = Counter()
    for update in range(updates):
        held: Counter[int] = Counter()
        for step in range(update * steps, (update + 1) * steps):
            held.update(set(batch_rows(described.run_id, "n", rows, 3, step)))
        got.update({row: perturbations * batches + 1 for row, batches in held.items()})
    first, more = measurements(described, rows, steps)
    assert max(got.values()) <= first + updates * more


def test_a_day_has_a_count_of_its_own() -> None:
    spent = Spent().then("2026-11-29", "a", 2.0, 5.0, 10.0)
    assert spent == Spent("2026-11-29", 7.0, "a")
    assert spent.then("2026-11-29", "a", 2.0, 3.0, 10.0) == Spent("2026-11-29", 10.0, "a")
    assert spent.then("2026-11-29", "b", 2.0, 2.0, 10.0) is None
    assert spent.then("2026-11-30", "a", 2.0, 8.0, 10.0) == Spent("2026-11-30", 10.0, "a")


def test_bytes_of_a_day_are_counted_beside_the_directions() -> None:
    spent = Spent().then("a day", "a", 2.0, 5.0, 10.0)
    assert spent is not None
    fetched = spent.fetching("a day", 60, 100)
    assert fetched == Spent("a day", 7.0, "a", 60)
    assert fetched.fetching("a day", 41, 100) is None
    assert fetched.then("a day", "a", 2.0, 1.0, 10.0) == Spent("a day", 8.0, "a", 60)
    assert fetched.fetching("another", 100, 100) == Spent("another", bytes=100)


def test_a_count_of_an_earlier_release_goes_on(tmp_path: Path) -> None:
    today = time.strftime("%Y-%m-%d", time.gmtime())
    (tmp_path / "directions.json").write_text(json.dumps({"day": today, "directions": 9.0, "run": "a"}))
    with NodeState(tmp_path) as state:
        assert state.fetch(10, 10)
        assert not state.spend("a", 1.0, 2.0, 10.0)


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


class Spending(Nothing):
    """A state folder whose day can be changed."""

    def __init__(self) -> None:
        self.spent, self.day = Spent(), "a day"

    def fetch(self, size: int, most: int) -> bool:
        spent = self.spent.fetching(self.day, size, most)
        self.spent = spent or self.spent
        return spent is not None


def test_masks_without_end_are_fetched_up_to_the_days_bytes_and_again_the_next_day() -> None:
    store = Spending()
    server = Server(store, NodePolicy(PolicyConfig(max_day_bytes=3 * ONE.mask_bytes)))
    for number in range(1, 6):
        server.describe(ONE.model_copy(update={"run": f"{number:032x}", "mask": f"{number:032x}"}))
        server.node.clock.go(PATIENCE_S)  # it waits for the broker first
    assert {want.blob.hex() for want in server.wants if want.blob} == {f"{n:032x}" for n in range(1, 4)}
    said = server.statuses[-1].refuses
    assert said is not None
    assert said.startswith("policy.max_day_bytes: with ")
    assert server.node.driver.counts[m.REFUSES] == 2

    server.begin(ONE)  # an honest run has to wait, too
    assert not server.node.machine_is_there
    store.day = "the next day"
    server.node.clock.go(LONGEST_PAUSE_S)
    server.give_mask(ONE)
    assert server.node.machine_is_there


def test_a_mask_that_is_always_another_one_is_fetched_no_more_often() -> None:
    server = Server(Spending(), NodePolicy(PolicyConfig(max_day_bytes=3 * ONE.mask_bytes)))
    server.describe(ONE.model_copy(update={"mask": "1" * 32, "mask_blob": ONE.mask}))
    for _ in range(10):
        server.give_mask(ONE)
        server.node.clock.settle()
    assert server.statuses[-1].refuses is not None
    assert server.statuses[-1].refuses.startswith("policy.max_day_bytes: ")


def test_snapshots_without_end_are_fetched_up_to_the_days_bytes() -> None:
    size = 3 * ONE.weights
    server = Server(Spending(), NodePolicy(PolicyConfig(max_day_bytes=ONE.mask_bytes + 3 * size)))
    server.begin(ONE)
    for number in range(1, 6):
        server.say(Offer(header(ONE, number), version=number, blob=number.to_bytes(16, "big"), size=size))
        server.node.clock.go(20 * PATIENCE_S)
    assert len({want.blob for want in server.wants if want.blob}) == 3
    assert server.statuses[-1].refuses is not None
    assert server.statuses[-1].refuses.startswith("policy.max_day_bytes: ")
