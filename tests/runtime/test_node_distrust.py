"""The node's driver: frames that nobody should believe, and a session that takes nothing."""

from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from meerkat_mq.core.path import Coefficient, Entry
from meerkat_mq.errors import NodeReplaced
from meerkat_mq.wire.descriptor import NodeStatus
from meerkat_mq.wire.frames import encode
from meerkat_mq.wire.messages import Chunk, Entries, Offer, Round, Update, Welcome
from tests.runtime.one_node import DIGEST, descriptor
from tests.runtime.one_server import BOOT, MASK, NODE, ONE, OTHER_MASK, TOPICS, TWO, Server, header


@pytest.fixture
def server() -> Iterator[Server]:
    with capture_logs():
        yield Server()


# --- what nobody should believe ---


def spoiled(payload: bytes) -> bytes:
    return payload[:-1] + bytes([payload[-1] ^ 1])


HOSTILE = {
    "a corrupted round": (TOPICS.round, spoiled(encode(Round(header(ONE), True, 1, 1, 0.5, 1000)))),
    "a round that is cut": (TOPICS.round, encode(Round(header(ONE), True, 1, 1, 0.5, 1000))[:-3]),
    "noise for a round": (TOPICS.round, b"\xff" * 40),
    "noise for a reply": (TOPICS.reply(NODE), b"\x00"),
    "noise for a server": (TOPICS.server, b"{"),
    "a run that is none": (TOPICS.run, b"[]"),
    "a run of another federation": (TOPICS.run, descriptor(OTHER_MASK, run="3" * 32, federation="g").encode()),
    "a mask as large as no mask": (
        TOPICS.run,
        descriptor(OTHER_MASK, run="3" * 32, mask_bytes=2**31, mask_chunks=2**15).encode(),
    ),
    "a displacement as large as none": (
        TOPICS.values,
        encode(Chunk(header(ONE), bytes(16), 0, 2, 70_000, bytes(65536))),
    ),
    "a round as a reply": (TOPICS.reply(NODE), encode(Round(header(ONE), True, 1, 1, 0.5, 1000))),
    "a reply as a round": (TOPICS.round, encode(Welcome(header(ONE), BOOT, 5))),
    "an update": (TOPICS.reply(NODE), encode(Update(header(ONE), BOOT, bytes(8), 0.5, (0.5,)))),
    "entries of another run": (
        TOPICS.reply(NODE),
        encode(Entries(header(TWO), (Entry(0, (Coefficient(0, 0, 0.5),), MASK.hash, DIGEST),))),
    ),
    "entries of another chain": (
        TOPICS.reply(NODE),
        encode(Entries(header(ONE, 1), (Entry(0, (Coefficient(0, 0, 0.5),), bytes(16), DIGEST),))),
    ),
    "an offer of another run": (TOPICS.reply(NODE), encode(Offer(header(TWO, 50), 50, bytes(16), 1000))),
}


@pytest.mark.parametrize(("topic", "payload"), HOSTILE.values(), ids=HOSTILE)
def test_what_is_forged_or_corrupted_changes_nothing_but_a_counter(server: Server, topic: str, payload: bytes) -> None:
    server.begin(ONE)
    sent, counted = list(server.node.transport.sent), server.node.driver.counts.total()
    server.node.receive(topic, payload)
    assert server.node.driver.counts.total() == counted + 1
    (model,) = server.node.models
    assert (model.entries, model.ordered, server.node.transport.sent) == ([], [], sent)
    server.ask(ONE)
    assert [update.header.version for update in server.updates] == [0]


def test_a_forged_status_is_put_right_and_a_newer_process_is_left_to_itself(server: Server) -> None:
    server.begin(ONE)
    own, said = TOPICS.up(NODE, "status"), len(server.statuses)
    server.node.receive(own, b"forged")
    assert [status.status for status in server.statuses[said:]] == ["online"]
    newer = NodeStatus(status="online", boot=BOOT + 1, link=9, host="elsewhere")
    with pytest.raises(NodeReplaced, match="runs on host elsewhere"):
        server.node.receive(own, newer.encode())
    assert server.node.transport.disowned


# --- what the session does not take ---


def test_what_finds_no_room_is_counted_and_the_node_goes_on(server: Server) -> None:
    server.begin(ONE)
    server.node.transport.room = 0
    server.ask(ONE)
    assert (server.updates, server.node.driver.counts["not sent: Update"]) == ([], 1)
    server.node.transport.room = None
    server.ask(ONE)
    assert [update.header.version for update in server.updates] == [0]


def test_without_a_connection_nothing_is_asked(server: Server) -> None:
    server.node.transport.link = None
    server.node.driver.disconnected()
    server.describe(ONE)
    server.node.clock.go(100.0)
    assert server.wants == []
    server.node.transport.link = 2
    server.node.driver.connected(2)
    server.node.clock.settle()
    assert {want.blob for want in server.wants} == {ONE.mask_hash}
