"""Parts of the server on their own: what is committed when, and what does not fit into the outbox."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from meerkat_mq.config import ServerConfig, ServerValuesConfig
from meerkat_mq.core.path import Entry, Term, short_hash
from meerkat_mq.core.values import quantised
from meerkat_mq.errors import LedgerError, NotConnected, RunError, TooFewNodes
from meerkat_mq.ledger.recovery import recovered
from meerkat_mq.ledger.run import Run
from meerkat_mq.ledger.snapshots import Snapshots
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.mqtt import Message, Session
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.records import Share, UpdateRecord, Verdict
from meerkat_mq.rounds.server import ServerMachine
from meerkat_mq.server.monitor import Monitor
from meerkat_mq.server.run import prepare_run
from meerkat_mq.server.scribe import GROUP_S, WANTS, KeepMetrics, KeepValues, Scribe
from meerkat_mq.server.server import Server
from meerkat_mq.wire.arrays import CHUNKS_A_REPLY, split
from meerkat_mq.wire.descriptor import NodeStatus, ServerState
from meerkat_mq.wire.frames import decode, encode
from meerkat_mq.wire.messages import Chunk, Entries, Header, Offer, Round, Update, Values, Want
from meerkat_mq.wire.values import decode_values, encode_values
from tests.support.waiting import until


def record(slot: int) -> UpdateRecord:
    return UpdateRecord(0, f"node-{slot}", slot, 1, 1, (0.5,), 0.5)


class BusyLedger(Ledger):
    """Takes its time; keeps the sizes of the groups."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.free = threading.Event()
        self.sizes: list[int] = []

    def commit_updates(self, records: Iterable[UpdateRecord]) -> None:
        records = list(records)
        self.sizes.append(len(records))
        assert self.free.wait(10)
        super().commit_updates(records)


class Desk:
    """Keeps what the scribe answers."""

    def __init__(self, run: Run) -> None:
        self.told: list[e.ServerEvent] = []
        self.replied_before: list[int] = []
        self.replies: list[tuple[str, Entries | Offer | Chunk | Want]] = []
        self.distributed: list[bytes] = []
        self.terms: list[tuple[int, ServerMachine]] = []
        self._run = run

    def handle(self, event: e.ServerEvent) -> None:
        self.told.append(event)
        self.replied_before.append(len(self.replies))

    def reply(self, node: str, frame: Entries | Offer | Chunk | Want) -> None:
        self.replies.append((node, frame))

    def distribute(self, blob: bytes) -> None:
        self.distributed.append(blob)

    def header(self) -> Header:
        return Header.of(self._run.descriptor.run_id, 1, 0, self._run.mask.hash)

    def took_term(self, term: int, machine: ServerMachine) -> None:
        self.terms.append((term, machine))


class Office:
    """A scribe at work, on a ledger and for a desk."""

    def __init__(self, folder: Path, worker: ThreadPoolExecutor) -> None:
        values = ServerValuesConfig(accept=True, codec="int8")
        self.config = ServerConfig(federation="f", state_dir=folder, engine="toy", toy_weights=10, values=values)
        self.ledger = BusyLedger.open(folder / LEDGER_FILE)
        self.run = prepare_run(self.config)
        self.snapshots = Snapshots(self.ledger, self.run.descriptor)
        self.replica = recovered(self.ledger, self.run, self.snapshots)
        self.scribe = Scribe(self.ledger, self.replica, self.run, self.snapshots, worker)
        self.desk = Desk(self.run)


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    with ThreadPoolExecutor(1) as worker:
        made = Office(tmp_path, worker)
        yield made
        made.ledger.free.set()
    made.ledger.close()


@pytest.fixture
async def working(office: Office) -> AsyncIterator[Office]:
    """In charge, with two slots given."""
    task = asyncio.create_task(office.scribe.run(office.desk))
    for work in (e.TakeTerm(0), e.CommitSlot("node-0", 0), e.CommitSlot("node-1", 1), e.CommitSlot("node-2", 2)):
        office.scribe.put(work)
        await office.scribe.idle()
    office.desk.told.clear()
    yield office
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_updates_that_come_while_the_ledger_is_busy_are_one_group_and_heard_only_then(working: Office) -> None:
    scribe, ledger, told = working.scribe, working.ledger, working.desk.told
    scribe.put(e.CommitUpdate(record(0), last=True))
    await until(lambda: ledger.sizes)
    for slot in (1, 2):
        scribe.put(e.CommitUpdate(record(slot), last=True))
    scribe.put(KeepMetrics(0, {"loss": 2.0}))
    scribe.put(e.ApplyTerms(0, (Term(0, 0, 0.5),)))
    assert told == []
    ledger.free.set()
    await until(lambda: len(told) == 3)
    assert ledger.sizes == [1, 2]
    assert ledger.open_updates() == tuple(map(record, range(3)))
    assert ledger.metrics() == {0: {"loss": 2.0}}
    assert [type(event) for event in told] == [e.UpdatesCommitted, e.UpdatesCommitted, e.TermsApplied]
    assert working.replica.version == 1
    assert working.scribe.committed[0] == 0


async def test_updates_wait_for_the_last_of_their_round_but_not_for_long(working: Office) -> None:
    scribe, ledger, told = working.scribe, working.ledger, working.desk.told
    ledger.free.set()
    clock = asyncio.get_running_loop().time
    for slot in range(3):
        await asyncio.sleep(0)
        scribe.put(e.CommitUpdate(record(slot), last=slot == 2))
    await until(lambda: told)
    assert ledger.sizes == [3]
    told.clear()
    began = clock()
    scribe.put(e.CommitUpdate(replace(record(0), version=1), last=False))
    await until(lambda: told)
    assert clock() - began >= GROUP_S


async def test_wants_do_not_hold_up_a_round(working: Office) -> None:
    scribe, desk = working.scribe, working.desk
    working.ledger.free.set()
    scribe.put(e.ApplyTerms(0, (Term(0, 0, 0.5),)))
    await until(lambda: desk.told)
    scribe.put(e.CommitEntry(Entry(0, (Term(0, 0, 0.5),), bytes(16), bytes(16)), (), 3, overdue=False))
    await until(lambda: len(desk.told) == 2)
    for number in range(2 * WANTS):
        scribe.put(e.SendEntries(f"w{number}", 0))
        scribe.put(e.SendEntries("again", 0))
    scribe.put(e.CommitUpdate(replace(record(0), version=1), last=True))
    await until(lambda: len(desk.told) == 3)
    assert isinstance(desk.told[-1], e.UpdatesCommitted)
    assert desk.replied_before[-1] <= 1
    await until(lambda: len(desk.replies) == WANTS, within_s=30)
    assert len({node for node, _ in desk.replies}) == WANTS


async def test_a_new_term_takes_theta_back_to_what_is_committed_and_leaves_the_old_machines_work(
    working: Office,
) -> None:
    working.ledger.free.set()
    before = working.scribe.committed
    working.scribe.put(e.CommitUpdate(record(0), last=True))
    working.scribe.put(e.ApplyTerms(0, (Term(0, 0, 0.5),)))
    working.scribe.put(e.TakeTerm(40))
    working.scribe.put(e.ApplyTerms(0, (Term(0, 0, 0.5),)))
    await working.scribe.idle()
    term, machine = working.desk.terms[-1]
    assert (term, machine.version) == (41, 0)
    assert working.replica.version == 0
    assert (working.replica.theta == before[1]).all()
    assert [term.term for term in working.ledger.terms()] == [1, 41]
    assert working.ledger.open_updates() == (record(0),)


# --- displacements ---


def values_update(number: float) -> tuple[Update, bytes]:
    """A values node's, and what it announces."""
    blob = encode_values(np.arange(10, dtype=np.float32) * np.float32(number), "float32")
    header = Header.of(bytes(16), 1, 0, bytes(16))
    return Update(header, 1, bytes(8), 0.5, (), values=Values(short_hash(blob), len(blob), 5)), blob


async def keep(office: Office, *numbers: float) -> tuple[Share, ...]:
    """Values nodes' updates come and are committed, by slot; equal shares of them."""
    names = []
    for slot, number in enumerate(numbers):
        update, blob = values_update(number)
        assert update.values is not None
        office.scribe.put(KeepValues(f"node-{slot}", update, blob, Verdict.ACCEPTED))
        await office.scribe.idle()
        office.scribe.put(e.CommitUpdate(replace(record(slot), scalars=(), values=update.values), last=True))
        await office.scribe.idle()
        names.append(update.values.blob)
    return tuple(Share(name, 1 / len(names)) for name in names)


async def test_a_displacement_is_kept_before_the_machine_hears_that_it_came(working: Office) -> None:
    working.ledger.free.set()
    update, blob = values_update(1.0)
    working.scribe.put(KeepValues("node-0", update, blob, Verdict.TOO_LARGE))
    await until(lambda: working.desk.told)
    (came,) = working.desk.told
    assert isinstance(came, e.ValuesCame)
    assert (came.node, came.update, came.verdict) == ("node-0", update, Verdict.TOO_LARGE)
    assert working.ledger.blob(short_hash(blob)) == blob


async def test_the_mean_is_encoded_once_kept_applied_and_handed_out_after_its_entry(working: Office) -> None:
    working.ledger.free.set()
    desk, theta = working.desk, working.replica.theta.copy()
    shares = await keep(working, 0.5, 1.25)
    working.scribe.put(e.ApplyTerms(0, (), shares))
    await working.scribe.idle()
    applied = desk.told[-1]
    assert isinstance(applied, e.TermsApplied)
    assert applied.displacement is not None
    blob = working.ledger.blob(applied.displacement.blob)
    assert blob is not None
    assert len(blob) == applied.displacement.size
    mean = quantised((np.arange(10, dtype=np.float32) * np.float32(0.875)), "int8")
    assert decode_values(blob, applied.displacement.blob, 10).tobytes() == mean.tobytes()
    assert working.replica.theta.tobytes() == (theta + mean).tobytes()
    assert (desk.distributed, working.ledger.displacement(applied.displacement.blob)) == ([], None)

    records = working.ledger.open_updates()
    entry = Entry(0, (), working.run.mask.hash, applied.digest, applied.displacement)
    working.scribe.put(e.CommitEntry(entry, records, 3, overdue=False))
    await working.scribe.idle()
    assert isinstance(desk.told[-1], e.EntryCommitted)
    assert desk.distributed == [blob]
    for name in (applied.displacement.blob, shares[0].blob):
        working.scribe.put(e.SendChunks("node-9", Want(desk.header(), 1, blob=name, chunks=(7, 0, 0))))
        await working.scribe.idle()
        await until(lambda: not working.scribe._wants)
    await until(lambda: desk.replies)
    ((node, chunk),) = desk.replies  # what a node sent is nobody else's business
    assert isinstance(chunk, Chunk)
    assert (node, chunk.data, chunk.count) == ("node-9", blob, 1)


async def test_what_cannot_be_committed_is_told_to_nobody(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise LedgerError("ledger.sqlite", "there is no space left")

    task = asyncio.create_task(office.scribe.run(office.desk))
    office.scribe.put(e.TakeTerm(0))
    await office.scribe.idle()
    monkeypatch.setattr(Ledger, "commit_entry", full)
    office.scribe.put(e.CommitSlot("node-0", 0))
    office.scribe.put(e.CommitEntry(Entry(0, (), bytes(16), bytes(16)), (), 1, overdue=False))
    with pytest.raises(LedgerError):
        await task
    assert office.desk.told == []
    assert office.ledger.slots() == {}


async def test_what_ruins_theta_ends_the_server_before_there_is_an_entry(office: Office) -> None:
    task, before = asyncio.create_task(office.scribe.run(office.desk)), office.replica.theta.tobytes()
    office.scribe.put(e.TakeTerm(0))
    await office.scribe.idle()
    office.scribe.put(e.ApplyTerms(0, (Term(0, 0, 3e38), Term(0, 0, 3e38)), ()))
    with pytest.raises(RunError, match=r"theta: is not finite after a step of coefficient 3e\+38; lower the"):
        await task
    assert (office.desk.told, office.ledger.version, office.replica.theta.tobytes()) == ([], 0, before)


async def test_chunks_that_nobody_asked_for_are_counted(office: Office) -> None:
    watch = Monitor(lambda event: None, None, 1, office.run.descriptor)
    server = Server(office.config, office.run, office.scribe, watch, lambda event: None, replace=False)
    ours = Header.of(office.run.descriptor.run_id, 0, 0, office.run.mask.hash)
    for header, kind in ((ours, "update"), (replace(ours, run=ours.run ^ 1), "update"), (ours, "want")):
        chunk = Chunk(header, bytes(16), 0, 1, 3, b"abc")
        server._on_message(Message(f"meerkat/v1/f/up/node/{kind}", encode(chunk)))
    assert watch.counts == {"undecodable: BadValue": 1, "misplaced: Chunk": 2}


async def test_a_finished_run_is_said_before_its_server_may_leave(office: Office) -> None:
    run = office.run
    watch = Monitor(lambda event: None, None, 1, run.descriptor)
    server = Server(office.config, run, office.scribe, watch, lambda event: None, replace=False)
    machine = ServerMachine(
        run.settings, term=2, server_id=office.scribe.server_id, base=bytes(16), version=run.settings.count
    )
    server.took_term(2, machine)
    before = ServerState(
        status="finished", run=run.descriptor.run, term=1, server_id="0" * 16, link=1, host="h", round=100, nodes=0
    )
    server._on_message(Message("meerkat/v1/f/server", before.encode(), retained=True))  # on the way to the greeting
    assert not server._finished.is_set()
    server._on_connected(2)
    assert server._finished.is_set()


async def test_a_reply_that_does_not_fit_into_the_outbox_is_dropped_and_counted(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = office.run
    watch = Monitor(lambda event: None, None, 1, run.descriptor)
    server = Server(office.config, run, office.scribe, watch, lambda event: None, replace=False)
    sent: list[str] = []

    def publish(session: Session, topic: str, payload: bytes, **options: bool) -> None:
        if sent:
            raise NotConnected(topic, "is full")
        sent.append(topic)

    monkeypatch.setattr(Session, "publish", publish)
    server.distribute(b"x" * 200_000)
    assert watch.counts["not published: the outbox is full"] == 1
    assert sent.pop() == "meerkat/v1/f/values"
    want = Want(Header.of(run.descriptor.run_id, 0, 0, run.mask.hash), 1, blob=run.mask.hash, chunks=(0, 7, 0))
    for _ in range(3):
        server._carry_out(e.SendChunks("node", want))
    assert sent == ["meerkat/v1/f/down/node/reply"]
    assert watch.counts["not published: the outbox is full"] == 1 + 2


def in_charge(office: Office, config: ServerConfig, slots: dict[str, int]) -> tuple[Server, Monitor]:
    """A server that has taken a term and knows these nodes; it has a link, and nothing leaves its outbox."""
    run = office.run
    watch = Monitor(lambda event: None, None, 1, run.descriptor)
    server = Server(config, run, office.scribe, watch, lambda event: None, replace=False)
    settings = replace(run.settings, min_nodes=config.rounds.min_nodes)
    machine = ServerMachine(settings, term=2, server_id=office.scribe.server_id, base=bytes(16), slots=slots)
    server.took_term(2, machine)
    server._session.link = 2
    server._on_connected(2)
    return server, watch


def masked(server: Server, office: Office, count: int) -> None:
    """Give the server a mask blob of so many chunks."""
    blob = bytes(count * 65_536)
    server._chunks = split(server.header(), office.run.mask.hash, blob)


async def test_wants_that_fill_the_outbox_do_not_end_the_server(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meerkat_mq.server.server.OUTBOX_BYTES", 2**20)
    server, watch = in_charge(office, office.config, {"node": 0})
    masked(server, office, CHUNKS_A_REPLY)
    topic, header, dropped = "meerkat/v1/f/up/node/want", server.header(), "not published: the outbox is full"
    chunks = encode(Want(header, 1, blob=office.run.mask.hash, chunks=tuple(range(CHUNKS_A_REPLY))))
    for count in (1, 2, 3):
        server._on_message(Message(topic, chunks))
        assert watch.counts[dropped] == count  # the first chunk that finds no room is the last that is tried
    welcome = Message(topic, encode(Want(header, 1, welcome=True)))
    while watch.counts[dropped] < 10:
        server._on_message(welcome)  # publishes the round, too

    server._on_message(Message("meerkat/v1/f/server", b"{}"))  # publishes the state
    server._on_message(Message(topic, encode(Want(replace(header, run=header.run ^ 1), 1, welcome=True))))  # the run
    server._on_connected(3)  # all that is retained
    assert watch.counts[dropped] == 10


async def test_a_want_is_answered_with_so_many_chunks_of_the_mask_at_most(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = in_charge(office, office.config, {"node": 0})
    masked(server, office, CHUNKS_A_REPLY + 9)
    sent: list[int] = []

    def publish(session: Session, topic: str, payload: bytes, **options: bool) -> None:
        chunk = decode(payload)
        assert isinstance(chunk, Chunk)
        sent.append(chunk.index)

    monkeypatch.setattr(Session, "publish", publish)
    want = Want(server.header(), 1, blob=office.run.mask.hash, chunks=tuple(range(5, 65_535)))
    server._carry_out(e.SendChunks("node", want))
    assert sent == list(range(5, 5 + CHUNKS_A_REPLY))


async def test_a_reply_that_is_larger_than_the_broker_takes_is_dropped_and_counted(office: Office) -> None:
    config = office.config.model_copy(
        update={"broker": office.config.broker.model_copy(update={"max_packet_bytes": 2048})}
    )
    server, watch = in_charge(office, config, {"node": 0})
    before = len(server._session._outbox)
    masked(server, office, 3)
    want = Want(server.header(), 1, blob=office.run.mask.hash, chunks=(0, 1, 2))
    server._carry_out(e.SendChunks("node", want))
    assert watch.counts["not published: over broker.max_packet_bytes"] == 1
    assert len(server._session._outbox) == before


async def test_a_round_that_outgrows_the_packets_is_dropped_counted_and_said(office: Office) -> None:
    config = office.config.model_copy(
        update={"broker": office.config.broker.model_copy(update={"max_packet_bytes": 1024})}
    )
    server, watch = in_charge(office, config, {"node": 0})
    over = watch.counts["not published: over broker.max_packet_bytes"]
    frame = Round(server.header(), True, 1, 1, 1.0, 1000, asked=frozenset(range(8000)))
    with capture_logs() as lines:
        server._carry_out(e.PublishRound(frame))
        server._carry_out(e.PublishRound(frame))
    assert watch.counts["not published: over broker.max_packet_bytes"] == over + 2
    (line,) = [line for line in lines if line["event"] == "not published"]
    assert line["topic"].endswith("/round")
    assert "over the limit of 1024" in line["problem"]


async def test_once_waits_no_more_when_a_round_opens_for_nodes_that_sleep_in_turn(office: Office) -> None:
    rounds = office.config.rounds.model_copy(update={"min_nodes": 3})
    config = office.config.model_copy(update={"rounds": rounds, "wait_for_nodes_s": 1e-3})
    server, _ = in_charge(office, config, {f"node-{slot}": slot for slot in range(3)})

    def says(node: str, status: NodeStatus) -> None:
        server._on_message(Message(f"meerkat/v1/f/up/{node}/status", status.encode()))

    for node in ("node-0", "node-1"):
        says(node, NodeStatus(status="online", boot=1, link=1, host="h"))
        says(node, NodeStatus(status="asleep", boot=1, link=1, host="h", wakes_in_s=3600))
    with pytest.raises(TooFewNodes, match="0 of 3 nodes"):
        await server._wait_for_nodes()
    says("node-2", NodeStatus(status="online", boot=1, link=1, host="h"))
    await server._wait_for_nodes()
