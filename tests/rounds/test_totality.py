"""No order of valid events makes a machine raise, wake for ever, or say what cannot be encoded."""

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.core.metrics import meaning
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.node import NodeMachine
from meerkat_mq.rounds.records import RoundOutcome, UpdateRecord, Verdict
from meerkat_mq.rounds.server import ServerMachine
from meerkat_mq.wire.frames import Entries, Header, Offer, Reason, Refusal, Round, Update, Values, Want, Welcome, encode
from tests.rounds import support as s

names = st.sampled_from(["a", "b", "c"])
small = st.integers(0, 3)
runs = st.sampled_from([s.RUN, s.RUN, s.RUN, s.MASK])
headers = st.builds(Header.of, runs, small, small, st.just(s.MASK))
digests = st.sampled_from([s.THETA_0, s.base_after(0), s.base_after(1), bytes(16)])
scalars = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=2).map(tuple)
seeds = st.none() | st.just((7,))
loss = st.just(1.0)
slots = st.frozensets(small)
ledger = st.sampled_from([*s.chain(4), *s.chain(4, seed=1)])
entries = st.lists(ledger, max_size=4).map(tuple) | st.integers(0, 4).map(lambda end: tuple(s.chain(end)))
states = st.builds(
    s.state,
    status=st.sampled_from(["online", "finished", "stopped", "lost"]),
    run=runs.map(bytes.hex),
    term=small,
    server_id=st.sampled_from(["4" * 16, s.SERVER_ID, "6" * 16]),
    link=small,
)
statuses = st.builds(
    s.status,
    st.sampled_from(["starting", "online", "online", "online", "stopped", "lost"]),
    boot=small,
    link=small,
    rows=small,
    run=st.none() | runs.map(bytes.hex),
) | st.builds(s.status, st.just("asleep"), boot=small, link=small, wakes_in_s=st.integers(1, 60))
values = st.builds(Values, digests, st.just(50), st.just(1))
announcements = st.builds(
    Update, headers, small, digests.map(lambda d: d[:8]), loss, st.just(()), st.none(), values
)  # fmt: skip
updates = st.builds(Update, headers, small, digests.map(lambda d: d[:8]), loss, scalars, seeds) | announcements
heard_before = st.sampled_from([(), ((4, 1),), ((4, 2), (5, 1))])
wants = st.builds(Want, headers, small, st.booleans(), st.none() | small)
records = st.lists(st.builds(UpdateRecord, small, names, small, small, st.just(1), scalars, loss), max_size=2)
products = st.sampled_from([(), ((1.0,) * 4,) * 2])
rounds = st.builds(
    Round, headers, st.booleans(), st.just(2), st.integers(1, 2), st.just(2.0**-10), st.just(1000), small, slots, slots,
    st.sampled_from([(), ((0, 1), (2, 1))]), entries, heard_before,
)  # fmt: skip
frames = (
    rounds
    | rounds
    | st.builds(Welcome, headers, small, small)
    | st.builds(Refusal, headers, small, st.sampled_from(Reason))
    | st.builds(Entries, headers, entries)
)

commits = st.builds(
    e.CommitEntry, entries.filter(len).map(lambda some: some[0]), records.map(tuple), small, st.booleans()
)  # fmt: skip
jobs = (
    st.builds(e.ApplyEntries, entries)
    | st.builds(e.StartSteps, small, small, st.just(2), st.just(2.0**-10))
    | st.builds(e.FetchSnapshot, st.builds(Offer, headers, small, digests, small))
)
NOTHING = RoundOutcome((), (), (), (), {})

server_junk = st.one_of(
    st.builds(e.StatusCame, st.just(0.0), names, statuses),
    st.builds(e.UpdateCame, st.just(0.0), names, updates),
    st.builds(e.WantCame, st.just(0.0), names, wants),
    st.builds(e.ServerSeen, st.just(0.0), states),
    st.builds(e.SlotCommitted, st.just(0.0), names),
    st.builds(e.UpdatesCommitted, st.just(0.0), records.map(tuple)),
    st.builds(e.ValuesFetched, st.just(0.0), names, announcements, st.none() | st.sampled_from(Verdict)),
    st.builds(e.RoundJudged, st.just(0.0), st.just(2), small, st.just(NOTHING)),
    st.builds(e.TermsApplied, st.just(0.0), small, digests),
    st.builds(e.EntryCommitted, st.just(0.0), commits),
    st.builds(e.DirectionsMeasured, st.just(0.0), small, products),
)
node_junk = st.one_of(
    st.builds(e.Connected, st.just(0.0)),
    st.builds(e.ServerCame, st.just(0.0), states),
    st.builds(e.FrameCame, st.just(0.0), frames),
    st.builds(e.FrameCame, st.just(0.0), frames),
    st.builds(e.EntriesApplied, st.just(0.0), entries, st.lists(digests, max_size=4).map(tuple)),
    st.builds(e.JobFailed, st.just(0.0), jobs),
    st.builds(e.StepsDone, st.just(0.0), small, scalars | st.just(()), loss),
    st.builds(e.StepsDone, st.just(0.0), small, st.just(()), loss, values),
)
# Beside junk: time passes, an update that fits comes, or the oldest effect is answered as a driver would.
helpful = st.floats(0.0, 60.0) | st.tuples(names, scalars) | st.just("answer")


def machine_wakes_later(machine: ServerMachine | NodeMachine, now: float) -> None:
    assert machine.wake_at is None or machine.wake_at > now


# As short as updates here are; the configuration itself wants four steps.
CALIBRATION = EarlyStoppingConfig(every=2).model_copy(update={"by": "vpcs", "calibration_steps": 2})
MEASURED = {"steps": 2, "measured": True, "early_stopping": CALIBRATION}
stopping = [MEASURED, MEASURED | {"quorum": 0.5, "lanes": 2}, {"perturbations": 2, "measured": True}]
BUFFERED: dict[str, Any] = {
    "mode": "buffered", "buffer_size": 2, "max_staleness": 2, "min_nodes": 1, "values_accepted": True
}  # fmt: skip
buffered = [BUFFERED, BUFFERED | {"steps": 2, "max_staleness": 0}, BUFFERED | MEASURED]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(server_junk | helpful | helpful, max_size=60),
    st.sampled_from(
        [{}, {"lanes": 2}, {"quorum": 0.5}, {"min_nodes": 1, "steps": 2}, {"fraction": 0.5}, *stopping, *buffered]
    ),
)
def test_no_order_of_events_upsets_the_server(moves: list[Any], changes: dict[str, Any]) -> None:
    slow = (
        e.CommitSlot, e.CommitUpdate, e.JudgeRound, e.ApplyTerms, e.CommitEntry, e.MeasureDirections, e.FetchValues
    )  # fmt: skip
    server = s.answered_server(*slow, deadline_s=10.0, grace_s=3.0, **changes)
    now = 0.0
    for move in moves:
        match move:
            case float():
                now += move
                server.tick(now)
                machine_wakes_later(server.machine, now)
            case (str() as name, scalars):
                server.update(now, name, *scalars)
            case "answer":
                server.answer(now)
            case event:
                server.give(replace(event, now=now))
    for effect in server.seen:
        if isinstance(effect, e.Reply | e.PublishRound):
            encode(effect.frame)
        if isinstance(effect, e.Count):
            assert meaning(effect.reason), effect


@settings(max_examples=300, deadline=None)
@given(st.lists(node_junk | node_junk | helpful, max_size=60), small, st.none() | updates)
def test_no_order_of_events_upsets_a_node(moves: list[Any], max_staleness: int, pending: Update | None) -> None:
    machine = s.node_machine(max_staleness=max_staleness, pending=pending)
    now, jobs = 0.0, list[e.NodeEffect]()
    for move in moves:
        event: e.NodeEvent
        match move:
            case float():
                event = e.Tick(now := now + move)
            case (str(), scalars):
                event = e.FrameCame(now, s.welcome(slot=len(scalars)))
            case "answer":
                match jobs.pop() if jobs else None:
                    case e.StartSteps(version):
                        event = e.StepsDone(now, version, (1.0,), 1.0)
                    case e.ApplyEntries(news):
                        event = e.EntriesApplied(now, news, tuple(entry.digest for entry in news))
                    case _:
                        continue
            case junk:
                event = replace(junk, now=now)
        effects = machine.handle(event)
        jobs += [effect for effect in effects if isinstance(effect, e.StartSteps | e.ApplyEntries)]
        for send in s.only(e.Send, effects):
            encode(send.frame)
        assert all(map(meaning, s.reasons(effects)))
        if isinstance(event, e.Tick):
            machine_wakes_later(machine, now)
