"""The server's driver: in charge by the ledger's word only, and what it leaves to another server."""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from meerkat_mq.config import ServerConfig
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.errors import AnotherServer, LedgerError, LedgerUnavailable
from meerkat_mq.ledger.recovery import recovered
from meerkat_mq.ledger.snapshots import Snapshots
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.runtime.ports import ServerMonitor
from meerkat_mq.runtime.server import ServerDriver
from meerkat_mq.runtime.succession import ANSWER_S, Past
from meerkat_mq.runtime.writer import TERM_PAUSE_S, Holdings
from meerkat_mq.server.run import prepare_run
from meerkat_mq.wire.descriptor import NodeStatus, RunDescriptor, ServerState, decode_control
from meerkat_mq.wire.frames import decode, encode
from meerkat_mq.wire.messages import Header, Want, Welcome
from meerkat_mq.wire.topics import Topics
from tests.runtime.ports import Recorder, VirtualClock, Worker

TOPICS, SERVER_ID, OTHER_ID = Topics("f"), "c" * 16, "d" * 16


class OneServer(ServerMonitor):
    """A server process on virtual ports; it is its own monitor."""

    def __init__(self, ledger: Ledger) -> None:
        config = ServerConfig(federation="f", state_dir=ledger.path.parent, engine="toy", toy_weights=10)
        self.ledger = ledger
        self.run = run = prepare_run(config)
        snapshots = Snapshots(ledger, run.descriptor)
        self.clock = VirtualClock()
        self.transport = Recorder()
        self.ledger_work = Worker(self.clock)
        self.counts: Counter[str] = Counter()
        self.terms: list[int] = []
        self.stands: list[int] = []
        self.driver = ServerDriver(
            "f",
            SERVER_ID,
            Holdings(run, ledger, recovered(ledger, run, snapshots), snapshots, Past.of(ledger)),
            transport=self.transport,
            clock=self.clock,
            ledger_work=self.ledger_work,
            measure_work=Worker(self.clock),
            other_work=Worker(self.clock),
            monitor=self,
        )

    def connect(self, link: int) -> None:
        self.transport.link = link
        self.driver.connected(link)
        self.clock.settle()

    def receive(self, topic: str, payload: bytes, *, retained: bool = False) -> None:
        self.driver.received(topic, payload, retained=retained)
        self.clock.settle()

    def take_charge(self) -> None:
        self.connect(1)
        self.connect(2)  # as the transport does that was told to renew

    @property
    def states(self) -> list[ServerState]:
        return [decode_control(sent, ServerState) for sent in self.transport.on(TOPICS.server)]

    def counted(self, reason: str) -> None:
        self.counts[reason] += 1

    def took_term(self, term: int) -> None:
        self.terms.append(term)

    def stood(self, version: int, theta: Float32Array) -> None:
        self.stands.append(version)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OneServer]:
    with capture_logs(), closing(Ledger.open(tmp_path / LEDGER_FILE)) as ledger:
        yield OneServer(ledger)


def state(status: str, *, term: int, server_id: str = OTHER_ID, run: str = "2" * 32) -> bytes:
    said = {"status": status, "run": run, "term": term, "server_id": server_id, "link": 9, "host": "there"}
    return ServerState.model_validate(said | {"round": 0, "nodes": 0}).encode()


def test_nothing_is_said_before_the_ledger_holds_the_term(server: OneServer) -> None:
    server.ledger_work.held = True
    server.connect(1)
    server.clock.go(100.0)
    assert (server.transport.sent, server.transport.renewed, server.terms) == ([], 0, [])
    server.ledger_work.free()
    assert (server.transport.sent, server.transport.renewed, server.terms) == ([], 1, [1])
    server.connect(2)
    assert [(state.status, state.term, state.link) for state in server.states] == [("online", 1, 2)]
    (described,) = server.transport.on(TOPICS.run)
    assert decode_control(described, RunDescriptor).run == server.run.descriptor.run


def test_a_term_that_the_disk_cannot_take_yet_is_waited_for(server: OneServer) -> None:
    server.ledger_work.fails.extend([LedgerUnavailable("ledger.sqlite", "is full")] * 2)
    server.connect(1)
    assert server.terms == []
    server.clock.until(lambda: server.terms, within_s=1.0)
    assert (server.terms, server.transport.renewed) == ([1], 1)


def test_a_rival_that_is_online_is_left_what_stands_there(server: OneServer) -> None:
    server.receive(TOPICS.server, state("online", term=4), retained=True)
    with pytest.raises(AnotherServer, match="a server on host there says that it is online"):
        server.connect(1)
    assert (server.transport.disowned, server.transport.sent, server.ledger.terms()) == (True, [], ())


def test_a_predecessor_that_answers_is_left_what_stands_there(server: OneServer) -> None:
    server.receive(TOPICS.server, state("lost", term=4), retained=True)
    server.connect(1)
    assert [(asked.status, asked.term) for asked in server.states] == [("lost", 4)]
    with pytest.raises(AnotherServer):
        server.receive(TOPICS.server, state("online", term=4))
    assert (server.transport.disowned, server.terms) == (True, [])


def test_a_run_that_would_be_lost_is_left_what_stands_there_also_where_nobody_answered(server: OneServer) -> None:
    server.receive(TOPICS.server, state("lost", term=4), retained=True)
    server.connect(1)
    with pytest.raises(LedgerError, match="holds no run"):
        server.clock.go(2 * ANSWER_S)
    assert (server.transport.disowned, server.ledger.terms()) == (True, ())


def test_a_question_is_not_answered_by_a_connection_that_is_gone(server: OneServer) -> None:
    server.receive(TOPICS.server, state("lost", term=4), retained=True)
    server.connect(1)
    server.driver.disconnected()
    server.clock.go(2 * ANSWER_S)
    assert (server.terms, len(server.states), server.ledger.terms()) == ([], 1, ())


def test_another_servers_term_in_the_ledger_disowns_the_topics_and_ends_this_one(server: OneServer) -> None:
    server.take_charge()
    said = len(server.transport.sent)
    with closing(Ledger.open(server.ledger.path)) as other:
        other.take_term(0, OTHER_ID, "there")
        online = NodeStatus(status="online", boot=1, link=1, host="h", run=server.run.descriptor.run)
        with pytest.raises(AnotherServer):
            server.receive(TOPICS.up("node-0", "status"), online.encode())
    assert server.transport.disowned
    server.driver.connected(3)
    assert len(server.transport.sent) == said


def test_a_node_hears_of_its_slot_once_the_ledger_holds_it(server: OneServer) -> None:
    server.take_charge()
    server.ledger_work.held = True
    online = NodeStatus(status="online", boot=1, link=1, host="h", run=server.run.descriptor.run)
    server.receive(TOPICS.up("node-0", "status"), online.encode())
    server.clock.go(0.5)
    assert server.transport.on(TOPICS.reply("node-0")) == []
    server.ledger_work.free()
    (welcome,) = server.transport.on(TOPICS.reply("node-0"))
    assert isinstance(frame := decode(welcome), Welcome)
    assert (frame.slot, frame.boot, server.ledger.slots()) == (0, 1, {"node-0": 0})


def test_a_flood_of_strangers_keeps_no_node_out(server: OneServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meerkat_mq.runtime.server.MAX_SLOTS", 1)
    server.take_charge()
    for node, word in (("stranger", "starting"), ("node-0", "online")):
        said = NodeStatus.model_validate({"status": word, "boot": 1, "link": 1, "host": "h"})
        server.receive(TOPICS.up(node, "status"), said.encode())
    assert server.ledger.slots() == {"node-0": 0}
    assert server.counts["too many nodes"] == 1


def test_between_two_terms_the_machine_hears_and_says_nothing(server: OneServer) -> None:
    server.take_charge()
    server.ledger_work.held = True
    seen = Header.of(server.run.descriptor.run_id, 7, 0, server.run.mask.hash)
    server.receive(TOPICS.up("node-9", "want"), encode(Want(seen, 1, welcome=True)))  # of a term that was forgotten
    said = len(server.transport.sent)
    online = NodeStatus(status="online", boot=1, link=1, host="h", run=server.run.descriptor.run)
    server.receive(TOPICS.up("node-0", "status"), online.encode())
    server.clock.go(10.0)
    assert len(server.transport.sent) == said
    server.ledger_work.free()
    server.clock.go(TERM_PAUSE_S)
    assert (server.terms, server.transport.renewed) == ([1, 8], 2)
    assert server.stands == [0]  # an evaluation for each term would cost the run minutes
    server.connect(3)
    assert (server.states[-1].term, server.ledger.slots()) == (8, {"node-0": 0})  # it is told now of who came meanwhile


def test_a_want_of_another_run_is_told_which_run_it_is(server: OneServer) -> None:
    server.take_charge()
    stranger = Header.of(bytes(16), 1, 0, bytes(16))
    server.receive(TOPICS.up("node-0", "want"), encode(Want(stranger, 1, welcome=True)))
    assert server.counts == {"of another run": 1}
    assert len(server.transport.on(TOPICS.run)) == 2


@pytest.mark.parametrize("payload", [b"\xff", b"{}", b"\x00" * 60])
@pytest.mark.parametrize("kind", ["status", "update", "want"])
def test_what_does_not_decode_changes_nothing_but_a_counter(server: OneServer, kind: str, payload: bytes) -> None:
    server.take_charge()
    said = list(server.transport.sent)
    server.receive(f"meerkat/v1/f/up/node-0/{kind}", payload)
    assert (server.counts.total(), server.transport.sent) == (1, said)
