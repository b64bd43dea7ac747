"""The server as a service, without a broker: what does not fit into its outbox, and whom it waits for."""

import pkgutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from meerkat_mq.config import ServerConfig, ServerValuesConfig
from meerkat_mq.errors import LedgerUnavailable, NotConnected, TooFewNodes
from meerkat_mq.ledger.recovery import recovered
from meerkat_mq.ledger.snapshots import Snapshots
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.mqtt import Session
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.server import ServerMachine
from meerkat_mq.runtime.measure import Measurer
from meerkat_mq.runtime.server import ServerDriver
from meerkat_mq.runtime.succession import Past
from meerkat_mq.runtime.writer import Holdings, KeepSightings
from meerkat_mq.server.monitor import Monitor
from meerkat_mq.server.run import prepare_run
from meerkat_mq.server.service import Server, serve
from meerkat_mq.wire.arrays import CHUNKS_A_REPLY, split
from meerkat_mq.wire.descriptor import NodeStatus, ServerState
from meerkat_mq.wire.frames import MAX_SLOTS, decode, encode
from meerkat_mq.wire.messages import Chunk, Header, Round, Want

SERVER_ID = "c" * 16


class Office:
    """What a server needs, and servers made of it."""

    def __init__(self, folder: Path, worker: ThreadPoolExecutor) -> None:
        values = ServerValuesConfig(accept=True, codec="int8")
        self.config = ServerConfig(federation="f", state_dir=folder, engine="toy", toy_weights=10, values=values)
        self.ledger = Ledger.open(folder / LEDGER_FILE)
        self.run = run = prepare_run(self.config)
        snapshots = Snapshots(self.ledger, run.descriptor)
        replica = recovered(self.ledger, run, snapshots)
        self.held = Holdings(run, self.ledger, replica, snapshots, Past.of(self.ledger))
        self._worker = worker

    def server(self, config: ServerConfig | None = None) -> tuple[Server, ServerDriver, Monitor]:
        watch = Monitor(lambda event: None, None, 1, self.run)
        server = Server(config or self.config, self.held, self._worker, watch, replace=False)
        return server, server._driver, watch

    def in_charge(self, config: ServerConfig, slots: dict[str, int]) -> tuple[Server, ServerDriver, Monitor]:
        """A server that has taken a term and knows these nodes; it has a link, and nothing leaves its outbox."""
        server, driver, watch = self.server(config)
        settings = self.run.settings.model_copy(update={"min_nodes": config.rounds.min_nodes})
        driver.took_term(2, ServerMachine(settings, term=2, server_id=SERVER_ID, base=bytes(16), slots=slots))
        server._session.link = 2
        driver.connected(2)
        return server, driver, watch

    def masked(self, driver: ServerDriver, count: int) -> None:
        """Give a server a mask blob of so many chunks."""
        driver._chunks = split(driver.header(), self.run.mask.hash, bytes(count * 65_536))


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    with ThreadPoolExecutor(1) as worker:
        made = Office(tmp_path, worker)
        yield made
    made.ledger.close()


async def test_chunks_that_nobody_asked_for_are_counted(office: Office) -> None:
    _, driver, watch = office.server()
    ours = Header.of(office.run.descriptor.run_id, 0, 0, office.run.mask.hash)
    for header, kind in ((ours, "update"), (replace(ours, run=ours.run ^ 1), "update"), (ours, "want")):
        chunk = Chunk(header, bytes(16), 0, 1, 3, b"abc")
        driver.received(f"meerkat/v1/f/up/node/{kind}", encode(chunk), retained=False)
    assert watch.counts == {"undecodable: BadValue": 1, "misplaced: Chunk": 2}


async def test_a_finished_run_is_said_before_its_server_may_leave(office: Office) -> None:
    run = office.run
    _, driver, watch = office.server()
    machine = ServerMachine(run.settings, term=2, server_id=SERVER_ID, base=bytes(16), version=run.settings.count)
    driver.took_term(2, machine)
    before = ServerState(
        status="finished", run=run.descriptor.run, term=1, server_id="0" * 16, link=1, host="h", round=100, nodes=0
    )
    driver.received("meerkat/v1/f/server", before.encode(), retained=True)  # on the way to the greeting
    assert not watch.finished.is_set()
    driver.connected(2)
    assert watch.finished.is_set()


async def test_a_reply_that_does_not_fit_into_the_outbox_is_dropped_and_counted(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = office.run
    _, driver, watch = office.server()
    sent: list[str] = []

    def publish(session: Session, topic: str, payload: bytes, **options: bool) -> None:
        if sent:
            raise NotConnected(topic, "is full")
        sent.append(topic)

    monkeypatch.setattr(Session, "publish", publish)
    driver.distribute(b"x" * 200_000)
    assert watch.counts["not published: the outbox is full"] == 1
    assert sent.pop() == "meerkat/v1/f/values"
    want = Want(Header.of(run.descriptor.run_id, 0, 0, run.mask.hash), 1, blob=run.mask.hash, chunks=(0, 7, 0))
    for _ in range(3):
        driver._carry_out(e.SendChunks("node", want))
    assert sent == ["meerkat/v1/f/down/node/reply"]
    assert watch.counts["not published: the outbox is full"] == 1 + 2


async def test_wants_that_fill_the_outbox_do_not_end_the_server(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meerkat_mq.server.service.OUTBOX_BYTES", 2**20)
    _, driver, watch = office.in_charge(office.config, {"node": 0})
    office.masked(driver, CHUNKS_A_REPLY)
    topic, header, dropped = "meerkat/v1/f/up/node/want", driver.header(), "not published: the outbox is full"
    chunks = encode(Want(header, 1, blob=office.run.mask.hash, chunks=tuple(range(CHUNKS_A_REPLY))))
    for count in (1, 2, 3):
        driver.received(topic, chunks, retained=False)
        assert watch.counts[dropped] == count  # the first chunk that finds no room is the last that is tried
    welcome = encode(Want(header, 1, welcome=True))
    while watch.counts[dropped] < 10:
        driver.received(topic, welcome, retained=False)  # publishes the round, too

    driver.received("meerkat/v1/f/server", b"{}", retained=False)  # publishes the state
    driver.received(
        topic, encode(Want(replace(header, run=header.run ^ 1), 1, welcome=True)), retained=False
    )  # the run
    driver.connected(3)  # all that is retained
    assert watch.counts[dropped] == 10


async def test_a_want_is_answered_with_so_many_chunks_of_the_mask_at_most(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, driver, _ = office.in_charge(office.config, {"node": 0})
    office.masked(driver, CHUNKS_A_REPLY + 9)
    sent: list[int] = []

    def publish(session: Session, topic: str, payload: bytes, **options: bool) -> None:
        chunk = decode(payload)
        assert isinstance(chunk, Chunk)
        sent.append(chunk.index)

    monkeypatch.setattr(Session, "publish", publish)
    want = Want(driver.header(), 1, blob=office.run.mask.hash, chunks=tuple(range(5, 65_535)))
    driver._carry_out(e.SendChunks("node", want))
    assert sent == list(range(5, 5 + CHUNKS_A_REPLY))


async def test_a_reply_that_is_larger_than_the_broker_takes_is_dropped_and_counted(office: Office) -> None:
    config = office.config.model_copy(
        update={"broker": office.config.broker.model_copy(update={"max_packet_bytes": 2048})}
    )
    server, driver, watch = office.in_charge(config, {"node": 0})
    before = len(server._session._outbox)
    office.masked(driver, 3)
    want = Want(driver.header(), 1, blob=office.run.mask.hash, chunks=(0, 1, 2))
    driver._carry_out(e.SendChunks("node", want))
    assert watch.counts["not published: over broker.max_packet_bytes"] == 1
    assert len(server._session._outbox) == before


async def test_once_waits_no_more_when_a_round_opens_for_nodes_that_sleep_in_turn(office: Office) -> None:
    rounds = office.config.rounds.model_copy(update={"min_nodes": 3})
    config = office.config.model_copy(update={"rounds": rounds, "wait_for_nodes_s": 1e-3})
    server, driver, _ = office.in_charge(config, {f"node-{slot}": slot for slot in range(3)})

    def says(node: str, status: NodeStatus) -> None:
        driver.received(f"meerkat/v1/f/up/{node}/status", status.encode(), retained=False)

    for node in ("node-0", "node-1"):
        says(node, NodeStatus(status="online", boot=1, link=1, host="h"))
        says(node, NodeStatus(status="asleep", boot=1, link=1, host="h", wakes_in_s=3600))
    with pytest.raises(TooFewNodes, match="0 of 3 nodes"):
        await server._wait_for_nodes()
    says("node-2", NodeStatus(status="online", boot=1, link=1, host="h"))
    await server._wait_for_nodes()


async def test_a_round_that_outgrows_the_packets_is_dropped_counted_and_said(office: Office) -> None:
    config = office.config.model_copy(
        update={"broker": office.config.broker.model_copy(update={"max_packet_bytes": 1024})}
    )
    _, driver, watch = office.in_charge(config, {"node": 0})
    over = watch.counts["not published: over broker.max_packet_bytes"]
    frame = Round(driver.header(), True, 1, 1, 1.0, 1000, asked=frozenset(range(8000)))
    with capture_logs() as lines:
        driver._carry_out(e.PublishRound(frame))
        driver._carry_out(e.PublishRound(replace(frame, attempt=1)))
    assert watch.counts["not published: over broker.max_packet_bytes"] == over + 2
    (line,) = [line for line in lines if line["event"] == "not published"]
    assert line["topic"].endswith("/round")
    assert "over the limit of 1024" in line["problem"]


async def test_news_of_nodes_do_not_pile_up_while_the_disk_takes_nothing_and_none_is_lost(office: Office) -> None:
    server, driver, _ = office.in_charge(office.config, {"node": 0})
    writer, received = driver.writer, server._session.received["want/node"]
    driver.received(
        "meerkat/v1/f/up/node/status", NodeStatus(status="starting", boot=1, link=1, host="h").encode(), retained=False
    )
    for _ in range(100):
        received.add("topic", b"want", 1)
        server._note_sightings()
    sightings = [order.sightings for order in writer._queue if isinstance(order, KeepSightings)]
    writer._queue.clear()
    server._note_sightings()
    sightings += [order.sightings for order in writer._queue if isinstance(order, KeepSightings)]
    assert len(sightings) == 2
    assert sum(sighting.packet_bytes for (sighting,) in sightings) == received.packet_bytes


async def test_strangers_without_number_are_counted_and_not_kept(office: Office) -> None:
    _, driver, watch = office.server()
    status = NodeStatus(status="online", boot=3, link=1, host="h")
    for known in (driver._statuses, watch.statuses):
        known.update(dict.fromkeys(map(str, range(MAX_SLOTS)), status))
    driver.received("meerkat/v1/f/up/one-more/status", status.encode(), retained=False)
    stopped = status.model_copy(update={"status": "stopped"})
    driver.received("meerkat/v1/f/up/7/status", stopped.encode(), retained=False)
    assert "one-more" not in watch.statuses
    assert watch.statuses["7"].status == "stopped"
    assert watch.counts["too many nodes"] == 1


async def test_what_takes_long_is_given_up_before_its_threads_are_waited_for(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up = threading.Event()
    monkeypatch.setattr(Measurer, "stop", lambda _: given_up.set())
    server, _, _ = office.server(office.config.model_copy(update={"once": True, "wait_for_nodes_s": 0.1}))
    measuring = server._others.submit(given_up.wait, 20.0)
    with pytest.raises(ExceptionGroup) as caught:
        await server.run()
    assert caught.group_contains(TooFewNodes)
    assert measuring.result()


@pytest.mark.parametrize("read", ["Past.of", "rising_from", "recovered"])
async def test_a_disk_that_fails_for_a_moment_while_a_server_starts_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    def fails_once(*args: object) -> object:
        if not failed:
            failed.append(LedgerUnavailable("ledger.sqlite", "cannot be read just now"))
            raise failed[0]
        return reads(*args)

    failed: list[LedgerUnavailable] = []
    owner, _, name = f"meerkat_mq.server.service.{read}".rpartition(".")
    reads = getattr(pkgutil.resolve_name(owner), name)
    monkeypatch.setattr(f"{owner}.{name}", fails_once)
    config = ServerConfig(
        federation="f", state_dir=tmp_path, engine="toy", toy_weights=10, once=True, wait_for_nodes_s=0.1
    )
    with pytest.raises(ExceptionGroup) as caught:
        await serve(config)
    assert caught.group_contains(TooFewNodes)
    assert failed
