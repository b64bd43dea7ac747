"""A node that comes back far behind is offered a snapshot: it takes it, or, where that fails, the entries."""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from meerkat_mq.config import BrokerConfig, NodeConfig
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import Coefficient, Entry, short_hash
from meerkat_mq.core.replica import Replica
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.mqtt import Message
from meerkat_mq.node.service import run_node
from meerkat_mq.runtime import blobs
from meerkat_mq.wire.arrays import encode_mask, split
from meerkat_mq.wire.descriptor import NodeStatus, RunDescriptor, ServerState, decode_control
from meerkat_mq.wire.frames import decode, encode
from meerkat_mq.wire.messages import Chunk, Entries, Header, Offer, Round, Want, Welcome
from meerkat_mq.wire.snapshot import encode_snapshot
from meerkat_mq.wire.topics import Topics
from tests.server.federation import Federation
from tests.support.mosquitto import Mosquitto
from tests.support.peer import Peer
from tests.support.waiting import until

TOPICS, NODE = Topics("f"), "node-0"
SIZE, HEAD, AT = 40_000, 60, 50  # weights; versions at the head and of the snapshot
RUN_ID, TERM = bytes(range(16)), 3


class Past:
    """A run that is over: its entries, and theta at the snapshot and at the end."""

    def __init__(self) -> None:
        self.mask: Mask = toy_mask(SIZE)
        replica = Replica(self.mask, run_id=RUN_ID, stream="mk1", digest_every=1)
        self.entries: list[Entry] = []
        previous = self.mask.hash
        for version in range(HEAD):
            terms = (Coefficient(0, 0, 0.5 / (1 + version)),)
            self.entries.append(Entry(version, terms, previous, replica.apply(terms)))
            previous = self.entries[-1].hash(RUN_ID)
            if version + 1 == AT:
                self.snapshot = encode_snapshot(RUN_ID, AT, previous, replica.theta)
        self.digest = self.entries[-1].digest.hex()


PAST = Past()
HEADER = Header.of(RUN_ID, TERM, HEAD, PAST.mask.hash)


class Server:
    """Speaks for a server whose run is over; `blobs` is what it has chunks of."""

    def __init__(self, offers: list[tuple[Offer, bytes]]) -> None:
        self.offers = [offer for offer, _ in offers]
        self.wants: list[Want] = []
        self.statuses: list[NodeStatus] = []
        mask = encode_mask(PAST.mask)
        named = [(PAST.mask.hash, mask), *((offer.blob, blob) for offer, blob in offers if blob)]
        self._chunks: dict[bytes, list[Chunk]] = {name: split(HEADER, name, blob) for name, blob in named}
        self.descriptor = RunDescriptor(
            federation="f", run=RUN_ID.hex(), engine="toy", model="toy", dtype="float32", fingerprint="0" * 64,
            tokenizer="0" * 64, mask=PAST.mask.hash.hex(), mask_bytes=len(mask), mask_chunks=-(-len(mask) // 65536),
            weights=SIZE, stream="mk1", rounds=HEAD, local_steps=1, directions=1, lr=0.1, eps=0.1, batch_size=1,
            digest_every=1,
        )  # fmt: skip
        self.peer: Peer | None = None

    def react(self, message: Message) -> None:
        if message.topic.endswith("/status"):
            self.statuses.append(decode_control(message.payload, NodeStatus))
            return
        want = decode(message.payload)
        assert isinstance(want, Want)
        self.wants.append(want)
        if want.welcome:
            self._reply(Welcome(HEADER, want.boot, 0))
        if want.entries_from is not None:
            self._reply(self._help(want.entries_from))
        for index in want.chunks:
            if want.blob in self._chunks:
                self._reply(self._chunks[want.blob][index])

    def _help(self, first: int) -> Offer | Entries:
        if first < AT and self.offers:
            return self.offers.pop(0)
        return Entries(HEADER, tuple(PAST.entries[first:]))

    def _reply(self, frame: Welcome | Entries | Offer | Chunk) -> None:
        assert self.peer is not None
        self.peer.session.publish(TOPICS.reply(NODE), encode(frame))

    def greet(self, link: int) -> None:
        assert self.peer is not None
        state = ServerState(
            status="online", run=RUN_ID.hex(), term=TERM, server_id="0" * 16, link=1, host="hub", round=HEAD
        )
        for topic, payload in (
            (TOPICS.server, state.encode()),
            (TOPICS.round, encode(Round(HEADER, False, 1, 1, 0.5, 0, entries=tuple(PAST.entries[-2:])))),
            (TOPICS.run, self.descriptor.encode()),  # last: not every broker keeps the order among topics
        ):
            self.peer.session.publish(topic, payload, retain=True)

    @property
    def entries_wanted(self) -> list[int]:
        return [want.entries_from for want in self.wants if want.entries_from is not None]

    @property
    def chunks_wanted(self) -> int:
        return sum(len(want.chunks) for want in self.wants if want.blob not in (None, PAST.mask.hash))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(blobs, "PATIENCE_S", 0.1)
    with capture_logs():
        yield


async def catch_up(folder: Path, broker: BrokerConfig, server: Server) -> None:
    """A node starts anew, and says in the end that it stands at the head with the head's digest."""
    (folder / "rows.jsonl").write_text('{"seed": 1}\n')
    config = NodeConfig(
        id=NODE, federation="f", data=folder / "rows.jsonl", state_dir=folder / "state", broker=broker
    )  # fmt: skip
    server.peer = Peer(
        broker,
        "server",
        [(TOPICS.up("+", "status"), 1), (TOPICS.up("+", "want"), 1)],
        react=server.react,
        greet=server.greet,
    )
    node = asyncio.create_task(run_node(config))
    try:
        await until(lambda: node.done() or [s.version for s in server.statuses][-1:] == [HEAD], within_s=30)
        assert not node.done(), node.exception()
        assert server.statuses[-1].digest == PAST.digest
    finally:
        node.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await node
        await server.peer.leave()


def offer(blob: bytes, version: int = AT, size: int | None = None) -> Offer:
    return Offer(HEADER, version, short_hash(blob), len(blob) if size is None else size)


async def test_a_node_far_behind_loads_the_snapshot_and_the_entries_after_it(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    server = Server([(offer(PAST.snapshot), PAST.snapshot)])
    await catch_up(tmp_path, mosquitto.config, server)
    assert server.entries_wanted == [0, AT]
    assert server.chunks_wanted == -(-len(PAST.snapshot) // 65536) > 1


OTHER_RUN = encode_snapshot(bytes(16), AT, bytes(16), PAST.mask.theta_0)
OTHER_VERSION = encode_snapshot(RUN_ID, AT - 1, bytes(16), PAST.mask.theta_0)
FEWER_WEIGHTS = encode_snapshot(RUN_ID, AT, bytes(16), PAST.mask.theta_0[1:])


@pytest.mark.parametrize(
    ("offered", "sent"),
    [
        (offer(PAST.snapshot), b""),
        (offer(PAST.snapshot), PAST.snapshot[::-1]),
        (offer(OTHER_RUN), OTHER_RUN),
        (offer(OTHER_VERSION), OTHER_VERSION),
        (offer(FEWER_WEIGHTS), FEWER_WEIGHTS),
        (offer(b"not a snapshot"), b"not a snapshot"),
        (offer(PAST.snapshot, size=2**32 - 1), PAST.snapshot),
        (offer(PAST.snapshot, size=1000), PAST.snapshot),
    ],
    ids=["never", "damaged", "another run", "another version", "another mask", "junk", "huge", "another size"],
)
async def test_where_a_snapshot_fails_the_entries_are_the_way(
    tmp_path: Path, mosquitto: Mosquitto, offered: Offer, sent: bytes
) -> None:
    server = Server([(offered, sent)])
    await catch_up(tmp_path, mosquitto.config, server)
    assert server.entries_wanted == [0, 0]


async def test_an_offer_of_what_the_node_has_already_is_not_taken(tmp_path: Path, mosquitto: Mosquitto) -> None:
    server = Server([(replace(offer(PAST.snapshot), version=0), PAST.snapshot)])
    await catch_up(tmp_path, mosquitto.config, server)
    assert server.chunks_wanted == 0


async def test_a_node_that_comes_late_to_a_real_server_takes_its_snapshot(federation: Federation) -> None:
    server = federation.server(rounds={"count": 210, "min_nodes": 1, "snapshot_every": 100, "deadline_s": 5.0})
    early = federation.node("early")
    last = await early.says("finished")
    await server.says("run finished")
    late = federation.node("late")
    found = await late.says("finished")
    assert late.said("snapshot loaded", version=200)
    assert (found["version"], found["digest"]) == (210, last["digest"])
