"""The server's driver: in charge by the ledger's word only, and what it leaves to another server."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from meerkat_mq.errors import AnotherServer, LedgerError, LedgerUnavailable
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.runtime.succession import ANSWER_S
from meerkat_mq.runtime.writer import TERM_PAUSE_S
from meerkat_mq.wire.descriptor import NodeStatus, RunDescriptor, ServerState, decode_control
from meerkat_mq.wire.frames import decode, encode
from meerkat_mq.wire.messages import Header, Want, Welcome
from tests.runtime.lone_server import OTHER_ID, TOPICS, OneServer


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
    for number in range(3):
        server.born(f"node-{number}")
    said = len(server.transport.sent)
    with closing(Ledger.open(server.ledger.path)) as other:
        other.take_term(0, OTHER_ID, "there")
        with pytest.raises(AnotherServer):
            server.receive(TOPICS.up("node-0", "update"), server.update())
    assert server.transport.disowned
    server.driver.connected(3)
    assert len(server.transport.sent) == said


def test_the_ledger_keeps_the_slot_of_a_node_that_answered(server: OneServer) -> None:
    server.take_charge()
    for number in range(3):
        server.born(f"node-{number}")
    (welcome,) = server.transport.on(TOPICS.reply("node-1"))
    assert isinstance(frame := decode(welcome), Welcome)
    assert (frame.slot, frame.boot, server.ledger.slots()) == (1, 1, {})
    server.receive(TOPICS.up("node-1", "update"), server.update())
    server.clock.go(1.0)
    assert server.ledger.slots() == {"node-1": 1}


def test_a_flood_of_strangers_keeps_no_node_out(server: OneServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meerkat_mq.runtime.server.MAX_SLOTS", 1)
    server.take_charge()
    for node, word in (("stranger", "starting"), ("node-0", "online")):
        said = NodeStatus.model_validate({"status": word, "boot": 1, "link": 1, "host": "h"})
        server.receive(TOPICS.up(node, "status"), said.encode())
    assert len(server.transport.on(TOPICS.reply("node-0"))) == 1
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
    assert server.states[-1].term == 8
    assert len(server.transport.on(TOPICS.reply("node-0"))) == 1  # it is told now of who came meanwhile


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
