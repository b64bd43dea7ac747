"""The transition tables are what the machines do: random walks, in which events come in any order."""

from collections import Counter
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import pytest

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.node import NodeMachine
from meerkat_mq.rounds.records import UpdateRecord
from meerkat_mq.rounds.server import ServerMachine
from meerkat_mq.rounds.transitions import NODE_TRANSITIONS, SERVER_TRANSITIONS
from meerkat_mq.simulate.run import judge
from meerkat_mq.simulate.schedule import make_schedule
from meerkat_mq.wire.frames import Entries, Offer, Reason, Values, Want
from tests.rounds import support as s

Moves = Counter[tuple[Any, type, Any]]
SLOW = (e.CommitSlot, e.CommitUpdate, e.JudgeRound, e.ApplyTerms, e.CommitEntry, e.MeasureDirections, e.FetchValues)
MEASURED: dict[str, Any] = {
    "steps": 2, "measured": True,
    "early_stopping": EarlyStoppingConfig(every=2).model_copy(update={"by": "vpcs", "calibration_steps": 2}),
}  # fmt: skip
BUFFERED: dict[str, Any] = {
    "mode": "buffered", "buffer_size": 2, "max_staleness": 2, "min_nodes": 1, "values_accepted": True
}  # fmt: skip
RULES: list[dict[str, Any]] = [{}, {"min_nodes": 1}, {"quorum": 0.5}, {"steps": 2}, MEASURED, BUFFERED]


def noting(handle: Callable[[Any, Any], Any], seen: Moves) -> Callable[[Any, Any], Any]:
    """`handle`, which notes which event leads from which phase to which."""

    def note(machine: Any, event: Any) -> Any:
        before = machine.phase
        effects = handle(machine, event)
        seen[before, type(event), machine.phase] += 1
        return effects

    return note


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Moves:
    """The moves of all machines in this test."""
    moves: Moves = Counter()
    for machine in (ServerMachine, NodeMachine):
        monkeypatch.setattr(machine, "handle", noting(machine.handle, moves))
    return moves


def walk_of_a_server(rng: Random) -> None:
    rules = s.settings(count=3, deadline_s=10.0, grace_s=3.0, **rng.choice(RULES))
    kept: dict[str, Any] = {}
    if rng.random() < 0.5:  # a ledger with updates of the round that was open when its server died
        scalars = (1.0,) * rules.steps_of(0)
        kept["slots"] = {"a": 0, "b": 1}
        kept["updates"] = [UpdateRecord(0, node, slot, 1, 1, scalars, 1.0) for node, slot in kept["slots"].items()]
    machine = ServerMachine(rules, term=1, server_id=s.SERVER_ID, base=s.THETA_0, **kept)
    server, now, link = s.AnsweredServer(machine, *SLOW), 0.0, 1
    server.start()
    for _ in range(100):
        node, kind = rng.choice("abc"), rng.randrange(12)
        event: Any = None
        if kind < 4 and server.held:
            event = server._answer(now, server.held.pop(0))
        elif kind < 7:
            server.update(now, node, *[rng.gauss(0, 1) for _ in range(rules.steps_of(machine.version))])
        elif kind == 7:
            server.update(now, node, values=Values(s.MASK, 50, 1))
        elif kind == 8:
            event = e.Tick(now := now + rng.choice([0.5, 4.0, 30.0]))
        elif kind == 9:
            event = e.StatusCame(now, node, s.status(link=(link := link + 1)))
        elif kind == 10:
            word = rng.choice(["lost", "stopped", "asleep"])
            event = e.StatusCame(now, node, s.status(word, link=link, wakes_in_s=5 if word == "asleep" else None))
        else:
            want = Want(s.header(), 1, True, None)
            event = rng.choice([e.WantCame(now, node, want), e.ServerSeen(now, s.state(status="lost"))])
        if event is not None:
            server.give(event)


PAST, OTHER = s.chain(6), s.chain(6, seed=1)


def frame_of(rng: Random, term: int) -> Any:
    """What a server may send, under a term that is mostly the newest."""
    version, past = rng.randint(0, 5), OTHER if rng.random() < 0.05 else PAST
    first = rng.randint(0, version)
    kind = rng.randrange(9)
    if kind == 0:
        return Entries(s.header(version, term), tuple(past[first:version]))
    if kind == 1:
        return Offer(s.header(version, term), version, s.THETA_0, 9)
    if kind == 2:
        return s.refusal(rng.choice(list(Reason)), version)
    if kind == 3:
        return s.welcome(rng.randint(0, 2), term)
    news = tuple(past[first:version]) if rng.random() < 0.7 else ()
    asked, heard = rng.choice([(0,), (0, 1), ()]), frozenset(rng.choice([(0,), (), ()]))
    return s.announced(version, term=term, asked=asked, is_open=rng.random() < 0.9, entries=news, heard=heard)


def answer_of(rng: Random, now: float, job: Any) -> Any:
    well = rng.random() < 0.6
    match job:
        case e.ApplyEntries(entries):
            digests = tuple(entry.digest if rng.random() < 0.95 else s.THETA_0 for entry in entries)
            return e.EntriesApplied(now, entries, digests) if well else e.JobFailed(now, job)
        case e.FetchSnapshot(offer):
            head, digest = PAST[offer.version - 1].hash(s.RUN), s.base_after(offer.version - 1)
            loaded = e.SnapshotLoaded(now, offer.version, head, digest)
            return loaded if well else e.JobFailed(now, job)
        case e.StartSteps(version):
            done = e.StepsDone(now, version, (1.0,) if well else (), 1.0)
            return done if rng.random() < 0.7 else e.JobFailed(now, job)


def walk_of_a_node(rng: Random) -> None:
    machine = s.node_machine(max_staleness=rng.choice([0, 2]))
    jobs: list[Any] = []
    now, term = 0.0, 1
    for _ in range(120):
        now += rng.choice([0.0, 0.1, 3.0])
        kind = rng.randrange(10)
        event: Any = None
        if kind < 4 and jobs:
            event = answer_of(rng, now, jobs.pop())
        elif kind < 7:
            event = e.FrameCame(now, frame_of(rng, max(1, term - (rng.random() < 0.1))))
        elif kind == 7:
            term += rng.random() < 0.2
            event = e.ServerCame(now, s.state(term=term, link=rng.randint(1, 3)))
        else:
            event = rng.choice([e.Connected(now), e.Tick(now)])
        effects = machine.handle(event)
        jobs += [job for job in effects if isinstance(job, e.ApplyEntries | e.FetchSnapshot | e.StartSteps)]


def failures_beside_an_update(rng: Random) -> None:
    """Steps of a version fail while an older update waits; the pause after that ends with whatever comes."""
    machine = s.node_machine(max_staleness=2)
    machine.handle(e.FrameCame(0.0, s.welcome()))
    machine.handle(e.FrameCame(0.0, s.announced()))
    machine.handle(e.StepsDone(0.0, 0, (1.0,), 1.0))
    machine.handle(e.FrameCame(0.0, s.announced(1, entries=tuple(PAST[:1]))))
    machine.handle(e.EntriesApplied(0.0, tuple(PAST[:1]), (PAST[0].digest,)))
    machine.handle(e.JobFailed(0.0, e.StartSteps(1, 0, 1, 2.0**-10)))
    later = 100.0
    events: list[e.NodeEvent] = [e.Tick(later), e.Connected(later), e.ServerCame(later, s.state(term=1))]
    machine.handle(rng.choice(events))


@pytest.mark.parametrize(
    ("walks", "table"),
    [
        ({walk_of_a_server: 600}, SERVER_TRANSITIONS),
        ({walk_of_a_node: 1500, failures_beside_an_update: 20}, NODE_TRANSITIONS),
    ],
)
def test_the_table_says_every_move_and_every_move_is_made(
    walks: Mapping[Callable[[Random], None], int],
    table: Mapping[Any, Mapping[type, frozenset[Any]]],
    seen: Moves,
) -> None:
    for walk, times in walks.items():
        for seed in range(times):
            walk(Random(seed))
    made: dict[Any, dict[type, set[Any]]] = {}
    for before, event, after in seen:
        if after is not before:
            made.setdefault(before, {}).setdefault(event, set()).add(after)
    assert made == {before: {event: set(after) for event, after in row.items()} for before, row in table.items() if row}


@pytest.mark.parametrize("seed", range(12))
def test_whole_federations_under_faults_move_as_the_tables_say(seed: int, seen: Moves) -> None:
    assert judge(make_schedule(seed))[1] == []
    tables: dict[Any, Mapping[type, frozenset[Any]]] = {**SERVER_TRANSITIONS, **NODE_TRANSITIONS}
    assert seen
    assert [move for move in seen if move[0] is not move[2] and move[2] not in tables[move[0]].get(move[1], ())] == []
