"""One node that sends what it likes, as fast as it likes: the server goes on, says little, and flags it."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from meerkat_mq.config import ServerValuesConfig
from meerkat_mq.core.path import short_hash
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.runtime.announcer import ANNOUNCE_S
from meerkat_mq.runtime.budgets import ANSWER_BYTES, ANSWER_BYTES_A_S, LONGEST_PAUSE_S, MESSAGES, TERM_STEP
from meerkat_mq.runtime.server import MOST_STRANGERS
from meerkat_mq.runtime.writer import TERM_PAUSE_S
from meerkat_mq.wire.arrays import CHUNKS_A_REPLY, split
from meerkat_mq.wire.descriptor import NodeStatus
from meerkat_mq.wire.frames import decode, encode
from meerkat_mq.wire.messages import Chunk, Values, Want, Welcome
from meerkat_mq.wire.values import encode_values, largest_blob
from tests.runtime.lone_server import TOPICS, OneServer

HONEST, EVIL = ("node-0", "node-1", "node-2"), "evil"
WANT, UPDATE, STATUS = (TOPICS.up(EVIL, kind) for kind in ("want", "update", "status"))


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with capture_logs() as lines:
        yield lines


@pytest.fixture
def server(tmp_path: Path, lines: list[Any]) -> Iterator[OneServer]:
    """In charge, with a round open and four nodes that have answered one."""
    with closing(Ledger.open(tmp_path / LEDGER_FILE)) as ledger:
        server = OneServer(ledger, values=ServerValuesConfig(accept=True))
        server.take_charge()
        for node in (*HONEST, EVIL):
            server.born(node)
        for nodes in (HONEST, (EVIL, *HONEST)):
            close_a_round(server, *nodes)
        assert set(ledger.slots()) == {*HONEST, EVIL}
        lines.clear()
        server.counts.clear()
        yield server


def close_a_round(server: OneServer, *nodes: str) -> None:
    before = server.driver.writer.committed[0]
    for node in nodes:
        server.receive(TOPICS.up(node, "update"), server.update())
    if server.driver.writer.committed[0] == before:
        server.clock.until(lambda: server.driver.writer.committed[0] > before, within_s=200.0)


def want(server: OneServer, **fields: Any) -> bytes:
    return encode(Want(server.header(fields.pop("term", None)), 1, **fields))


def flags(server: OneServer) -> dict[str, int]:
    return {reason: times for reason, times in server.counts.items() if reason.startswith("flagged")}


# --- displacements ---


def announce(server: OneServer, blob: bytes, size: int | None = None) -> None:
    named = Values(short_hash(blob), len(blob) if size is None else size, 1)
    server.receive(UPDATE, server.update(scalars=(), values=named))
    server.clock.go(0.001)


def give(server: OneServer, blob: bytes, chunk: int = 0) -> None:
    parts = split(server.header(), short_hash(blob), blob)
    server.receive(UPDATE, encode(parts[chunk]))
    server.clock.go(0.001)


def test_what_is_no_displacement_costs_its_node_what_other_messages_do(server: OneServer) -> None:
    """It was announced, fetched and thrown away without end, as fast as it came."""
    server.transport.sent.clear()
    for number in range(1000):
        blob = number.to_bytes(4, "little") * 20
        announce(server, blob)
        give(server, blob)
    asked = [frame for frame in map(decode, server.transport.on(TOPICS.reply(EVIL))) if isinstance(frame, Want)]
    assert len(asked) <= MESSAGES + 30
    assert server.driver.flagged(EVIL) == "over budget"
    close_a_round(server, *HONEST)


def test_what_is_announced_larger_than_any_displacement_is_no_way_around_the_budget(server: OneServer) -> None:
    for _ in range(1000):
        announce(server, b"x", 2**20)
    assert server.driver.flagged(EVIL) == "over budget"
    assert server.counts["values missed"] <= MESSAGES + 10


def test_a_chunk_that_comes_again_and_again(server: OneServer) -> None:
    blob = encode_values(np.ones(10, np.float32), "float32") + bytes(100)
    most = largest_blob(10)
    announce(server, blob, most)
    first = Chunk(server.header(), short_hash(blob), 0, 2, most, bytes(2**16))
    for number in range(20):
        server.receive(UPDATE, encode(first))
        if number == 2:
            assert server.driver.flagged(EVIL) == ""
    assert server.driver.flagged(EVIL) == "over budget"


# --- wants ---


def test_a_flood_of_wants_costs_a_few_announcements_and_answers(server: OneServer) -> None:
    server.transport.sent.clear()
    asked = want(server, welcome=True, entries_from=0)
    for _ in range(8000):
        server.receive(WANT, asked)
        server.clock.go(1 / 800)
    rounds, replies = server.transport.on(TOPICS.round), server.transport.on(TOPICS.reply(EVIL))
    assert len(rounds) <= 10 / ANNOUNCE_S + 2
    assert len(replies) <= 2 * (MESSAGES + 10 * 11)
    assert server.counts["over budget"] > 7000
    assert flags(server) == {"flagged: over budget": 1}
    assert server.driver.flagged(EVIL) == "over budget"


def test_others_are_answered_and_rounds_close_during_a_flood(server: OneServer) -> None:
    asked, before = want(server, welcome=True), server.driver.writer.committed[0]
    for number in range(4000):
        server.receive(WANT, asked)
        if number % 400 == 399:
            server.transport.sent.clear()
            server.receive(TOPICS.up("node-1", "want"), want(server, welcome=True))
            (answer,) = server.transport.on(TOPICS.reply("node-1"))
            assert isinstance(decode(answer), Welcome)
            close_a_round(server, *HONEST, EVIL)  # what it owes the round it may send at any time
        server.clock.go(1 / 800)
    assert server.driver.writer.committed[0] == before + 10
    assert server.driver.flagged("node-1") == ""


def test_the_last_question_of_a_flood_is_answered_in_the_end(server: OneServer) -> None:
    for _ in range(2 * MESSAGES):
        server.receive(WANT, want(server))
    said = len(server.transport.on(TOPICS.reply(EVIL)))
    server.receive(WANT, want(server, welcome=True))
    assert len(server.transport.on(TOPICS.reply(EVIL))) == said
    server.clock.go(1.0)
    assert len(server.transport.on(TOPICS.reply(EVIL))) == said + 1


def test_a_node_that_wants_chunks_again_and_again_is_sent_a_bounded_number_of_bytes(server: OneServer) -> None:
    name = server.run.descriptor.mask_name
    server.driver._chunks = split(server.header(), name, bytes(CHUNKS_A_REPLY * 65_536))
    asked, seconds = want(server, blob=name, chunks=tuple(range(CHUNKS_A_REPLY))), 60
    for _ in range(seconds * 40):
        server.receive(WANT, asked)
        server.clock.go(1 / 40)
    sent = sum(map(len, server.transport.on(TOPICS.reply(EVIL))))
    assert ANSWER_BYTES / 2 < sent < 2 * ANSWER_BYTES + seconds * ANSWER_BYTES_A_S
    assert server.driver.flagged(EVIL) == "over budget"


# --- terms ---


def test_a_ledger_from_a_backup_gets_past_the_terms_that_it_lacks_at_once(server: OneServer) -> None:
    server.clock.go(TERM_PAUSE_S)
    server.receive(TOPICS.up("node-1", "want"), want(server, term=server.terms[-1] + TERM_STEP - 1))
    assert server.terms[-1] == server.terms[0] + TERM_STEP
    assert flags(server) == {}


def test_forged_terms_cost_the_rounds_a_few_connections(server: OneServer) -> None:
    for _ in range(240):
        server.receive(WANT, want(server, term=server.terms[-1] + 1))
        server.clock.go(0.25)
        server.reconnect()
    assert len(server.terms) - 1 <= 6  # in a minute: after 1, 2, 4, … s
    assert server.driver.flagged(EVIL) == "raises terms"
    assert server.counts["a higher term, too soon"] > 200
    assert server.counts["nodes have seen a higher term"] == len(server.terms) - 1


def test_honest_nodes_that_have_seen_a_much_higher_term_are_heard_behind_a_forger(server: OneServer) -> None:
    for _ in range(2400):
        server.receive(WANT, want(server, term=server.terms[-1] + 1))
        server.clock.go(0.25)
        server.reconnect()
    seen, began = server.terms[-1] + 2000, server.clock.now()
    while server.terms[-1] <= seen:
        server.receive(WANT, want(server, term=server.terms[-1] + 1))
        server.receive(TOPICS.up("node-1", "want"), want(server, term=seen))
        server.clock.go(1.0)
        server.reconnect()
        assert server.clock.now() - began < 3 * LONGEST_PAUSE_S
    assert server.driver.flagged("node-1") == ""


def test_no_forger_gets_near_the_end_of_the_terms(server: OneServer) -> None:
    """Nor do a hundred, who take turns."""
    began = server.clock.now()
    for second in range(3000):
        forged = want(server, term=server.terms[-1] + 2**16 - 1)
        server.receive(TOPICS.up(f"evil-{second % 100}", "want"), forged)
        server.clock.go(1.0)
        server.reconnect()
    assert server.terms[-1] < 2 * TERM_STEP * (server.clock.now() - began)
    assert server.terms[-1] < 2**32 / 1000


# --- junk ---


def test_junk_costs_a_few_lines_and_no_decoding(server: OneServer, lines: list[Any]) -> None:
    for number in range(25_725):
        server.receive((UPDATE, WANT, STATUS)[number % 3], b"%d" % number * (number % 50))
        server.clock.go(40 / 25_725)
    assert len(lines) < 60
    assert sum(len(str(line)) for line in lines) < 20_000
    dropped = sum(times for reason, times in server.counts.items() if reason.startswith("undecodable"))
    assert dropped <= 3 * (MESSAGES + 10 * 41)
    assert server.counts["over budget"] > 20_000
    assert server.driver.flagged(EVIL) == "over budget"


def test_large_junk_is_dearer_than_small(server: OneServer) -> None:
    for _ in range(100):
        server.receive(UPDATE, bytes(64_000))
    assert server.counts["undecodable: BadMagic"] == MESSAGES // 16
    assert server.driver.flagged(EVIL) == "over budget"


def test_a_node_that_is_over_its_budget_is_known_to_have_left_in_the_end(server: OneServer) -> None:
    assert server.driver.machine is not None
    for link in range(2, 2 * MESSAGES):
        said = NodeStatus(status="online", boot=1, link=link, host="h", run=server.run.descriptor.run)
        server.receive(STATUS, said.encode())
    assert server.driver.machine.online == 4
    server.receive(STATUS, NodeStatus(status="stopped", boot=1, link=link, host="h").encode())
    assert server.driver.machine.online == 4
    server.clock.go(1.0)
    assert server.driver.machine.online == 3


def test_a_node_that_behaves_again_is_flagged_no_more(server: OneServer) -> None:
    for _ in range(2 * MESSAGES):
        server.receive(UPDATE, b"junk")
    assert server.driver.flagged(EVIL)
    server.clock.go(1000.0)
    assert server.driver.flagged(EVIL) == ""
    server.receive(UPDATE, b"junk")
    assert server.driver.flagged(EVIL) == ""


# --- invented ids ---


def test_invented_ids_get_no_slot_that_lasts_and_stop_no_round(server: OneServer) -> None:
    before = server.driver.writer.committed[0]
    for number in range(6000):
        server.born(f"ghost-{number}")
        if number % 600 == 599:
            close_a_round(server, *HONEST, EVIL)
        server.clock.go(0.001)
    assert set(server.ledger.slots()) == {*HONEST, EVIL}
    assert server.driver.writer.committed[0] == before + 10
    assert len(server.driver._statuses) <= MOST_STRANGERS + 4
    assert server.counts["no slot left"] > 0
    assert max(map(len, server.transport.on(TOPICS.round))) < 1000
    server.receive(TOPICS.up("node-1", "want"), want(server, welcome=True))
    assert len(server.transport.on(TOPICS.reply("node-1"))) == 2
