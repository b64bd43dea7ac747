"""What the ledger gets to see of nodes and of evaluations."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from structlog.testing import capture_logs

from meerkat_mq.config import RoundsConfig, ServerConfig
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.path import Entry
from meerkat_mq.ledger.store import without_flag
from meerkat_mq.mqtt import MessageCount
from meerkat_mq.observe.events import Evaluated, RoundClosed, RunEvent
from meerkat_mq.rounds.events import CommitEntry
from meerkat_mq.rounds.records import Judgement, UpdateRecord, Verdict
from meerkat_mq.server.monitor import Monitor
from meerkat_mq.server.run import prepare_run
from meerkat_mq.tasks.task import Evaluation
from meerkat_mq.wire.descriptor import NodeStatus
from meerkat_mq.wire.messages import Values
from tests.support.waiting import until

FOUND = Evaluation(10, {"accuracy": 0.75, "loss": 1.5, "majority": 0.5})


class Evaluator:
    async def evaluate(self, theta: Float32Array) -> Evaluation:
        return FOUND


def made(tmp_path: Any, evaluator: Any = None, told: list[RunEvent] | None = None, **rounds: Any) -> Monitor:
    run = prepare_run(ServerConfig(federation="f", state_dir=tmp_path, engine="toy", rounds=RoundsConfig(**rounds)))
    return Monitor((told if told is not None else []).append, evaluator, 5, run)


def commit(version: int, records: tuple[UpdateRecord, ...], *more: Any) -> CommitEntry:
    return CommitEntry(Entry(version, (), bytes(16), bytes(16)), records, 3, False, *more)


def status(word: str = "online", link: int = 1) -> NodeStatus:
    return NodeStatus.model_validate({"status": word, "boot": 3, "link": link, "host": "h", "rows": 8})


def test_a_sighting_says_what_is_new(tmp_path: Any) -> None:
    eye = made(tmp_path)
    eye.heard_from("a", status())
    eye.heard_from("b", status())
    counts = {
        "update/a": MessageCount(2, 100, 150),
        "want/a": MessageCount(1, 30, 50),
        "status/b": MessageCount(1, 5, 7),
        "update": MessageCount(9),
    }
    eye.received = counts
    first = {found.node: found for found in eye.sightings()}
    assert (first["a"].updates, first["a"].packet_bytes, first["a"].rows, first["a"].boot) == (2, 200, 8, 3)
    assert (first["b"].updates, first["b"].packet_bytes) == (0, 7)
    assert eye.sightings() == ()
    counts["update/a"] = MessageCount(3, 150, 225)
    eye.heard_from("b", status("lost"))
    second = {found.node: found for found in eye.sightings()}
    assert (second["a"].updates, second["a"].packet_bytes) == (1, 75)
    assert (second["b"].status, second["b"].updates, second["b"].packet_bytes) == ("lost", 0, 0)


async def test_evaluations_go_to_the_ledger(tmp_path: Any) -> None:
    kept: list[tuple[int, Mapping[str, float]]] = []
    told: list[RunEvent] = []
    eye = made(tmp_path, Evaluator(), told)
    task = asyncio.create_task(eye.run(lambda found: kept.append((found.version, found.metrics))))
    for version in (0, 3, 10):
        eye.stood(version, np.zeros(2, dtype=np.float32))
        await until(partial(lambda version: len(kept) > version // 10, version))
    found = {"accuracy": 0.75, "loss": 1.5, "majority": 0.5, "rows": 10.0}
    assert kept == [(0, found), (10, found)]
    assert [event.version for event in told if isinstance(event, Evaluated)] == [0, 10]
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_a_closed_round_tells_gradip_and_judgements(tmp_path: Any) -> None:
    told: list[RunEvent] = []
    records = tuple(
        UpdateRecord(0, node, slot, 1, 1, (2.0, -4.0)[:steps], loss, verdict)
        for slot, (node, steps, loss, verdict) in enumerate(
            [("a", 2, 1.0, Verdict.ACCEPTED), ("b", 2, 9.0, Verdict.OUTLIER), ("c", 1, 3.0, Verdict.EARLY_STOPPED)]
        )
    )
    judgements = (Judgement(0, "c", 4.0, 0.5, True),)
    eye = made(tmp_path, told=told)
    eye.closed(commit(0, records, ((0.5, 0.25), (0.0, 0.0)), judgements), 3)
    eye.closed(commit(1, records), 3)
    first, second = told
    assert isinstance(first, RoundClosed)
    assert isinstance(second, RoundClosed)
    assert (first.gradip, first.judgements) == ({"a": (1.0, -1.0), "c": (1.0,)}, judgements)
    assert (first.loss, first.heard) == (2.0, 3)
    assert (second.gradip, second.judgements) == ({}, ())


async def test_gradip_of_a_stale_update_is_along_the_directions_of_its_own_version(tmp_path: Any) -> None:
    told: list[RunEvent] = []
    eye = made(tmp_path, told=told, mode="buffered", max_staleness=1)
    stale = UpdateRecord(0, "a", 0, 1, 1, (2.0,), 1.0)
    values = UpdateRecord(1, "b", 1, 1, 1, (), 1.0, values=Values(bytes(16), 100, 5))
    eye.closed(commit(0, (), ((0.5,),)), 3)
    eye.closed(commit(1, (stale, values), ((0.25,),)), 3)
    eye.closed(commit(2, (stale,), ((0.25,),)), 3)
    found = [dict(event.gradip) for event in told if isinstance(event, RoundClosed)]
    assert found == [{}, {"a": (1.0,)}, {}]


async def test_nobody_waits_for_the_last_words_of_a_sleeper(tmp_path: Any) -> None:
    eye = made(tmp_path)
    eye.heard_from("a", NodeStatus(status="asleep", boot=1, link=1, host="h", wakes_in_s=600))
    async with asyncio.timeout(5):
        await eye.finish(np.zeros(2, dtype=np.float32))


class Slow:
    """Evaluates what it is told to; `CUDA out of memory` at every version in `fails`."""

    def __init__(self, *fails: int) -> None:
        self.began: list[float] = []
        self.may_end = asyncio.Event()
        self._fails = fails

    async def evaluate(self, theta: Float32Array) -> Evaluation:
        self.began.append(float(theta[0]))
        await self.may_end.wait()
        if int(theta[0]) in self._fails:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore\nand more")
        return FOUND


def at(version: int) -> Float32Array:
    return np.full(2, version, dtype=np.float32)


@contextlib.asynccontextmanager
async def running(eye: Monitor) -> AsyncIterator[list[int]]:
    kept: list[int] = []
    task = asyncio.create_task(eye.run(lambda found: kept.append(found.version)))
    try:
        yield kept
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_behind_a_slow_evaluation_only_the_newest_waits(tmp_path: Any) -> None:
    slow = Slow()
    eye = made(tmp_path, slow, count=1000)
    async with running(eye) as kept:
        eye.stood(0, at(0))
        await until(lambda: slow.began)
        for version in range(5, 1001, 5):
            eye.stood(version, at(version))
        slow.may_end.set()
        async with asyncio.timeout(5):
            await eye.finish(at(1000))
        assert slow.began == kept == [0, 1000]
    assert eye.counts["evaluation left out"] == 199


async def test_an_evaluation_that_fails_costs_its_figure_alone(tmp_path: Any) -> None:
    slow = Slow(5, 10, 15)
    slow.may_end.set()
    eye = made(tmp_path, slow, count=20)
    with capture_logs() as lines:
        async with running(eye) as kept:
            for number, version in enumerate(range(0, 25, 5), start=1):
                eye.stood(version, at(version))
                await until(partial(lambda number: len(slow.began) == number, number))
            async with asyncio.timeout(5):
                await eye.finish(at(20))
    assert kept == [0, 20]
    assert eye.counts["evaluation failed"] == 3
    (line,) = [line for line in lines if line["event"] == "evaluation failed"]
    assert (line["version"], line["problem"]) == (5, "CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_node_whose_projected_gradients_are_noise_is_named(tmp_path: Any) -> None:
    eye, noisy = made(tmp_path), status().model_copy(update={"signal": 0.812})
    with capture_logs() as logs:
        eye.heard_from("a", status())
        for _ in range(2):
            eye.heard_from("b", noisy)
    assert [(log["event"], log["node"]) for log in logs] == [("projected gradients are noise", "b")]
    assert eye.counts["projected gradients are noise"] == 1
    said = {sighting.node: without_flag(sighting.status) for sighting in eye.sightings()}
    assert said == {"a": ("online", ""), "b": ("online", "projected gradients are noise: signal to noise 0.812")}
