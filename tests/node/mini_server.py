"""A server in miniature that says what a test wants, and a node in this process."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Self

import pytest

from meerkat_mq.config import BrokerConfig, NodeConfig
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.path import Coefficient, Displacement, Entry, short_hash
from meerkat_mq.core.replica import Replica
from meerkat_mq.engines.toy import QuadraticEngine, toy_mask
from meerkat_mq.mqtt import Message
from meerkat_mq.node.service import run_node
from meerkat_mq.wire.arrays import encode_mask, split
from meerkat_mq.wire.descriptor import NodeStatus, RunDescriptor, ServerState, decode_control
from meerkat_mq.wire.frames import Frame, decode, encode
from meerkat_mq.wire.messages import Chunk, Entries, Header, Round, Update, Want, Welcome
from meerkat_mq.wire.topics import Topics
from meerkat_mq.wire.values import decode_values, encode_values
from tests.support.peer import Peer
from tests.support.waiting import until

NODE, SLOT = "node-0", 0
TOPICS = Topics("f")
RUN_ID = bytes(range(16))
PATIENCE_S = 30.0
AGAIN_S = 0.25  # each makes a node ask again for what it fetches


class MiniServer:
    """Welcomes the one node, answers its wants, and keeps what it says.

    Attributes:
        has: blobs of which it has chunks to give.
        offers_chunks: whether it gives them; a mask that it retains, always.
        offers_entries: whether it answers a want for them.
    """

    def __init__(self, broker: BrokerConfig, *, weights: int = 40, retains_mask: bool = True, **settings: Any) -> None:
        self.mask = toy_mask(weights)
        blob = encode_mask(self.mask)
        defaults: dict[str, Any] = {
            "federation": "f", "run": RUN_ID.hex(), "engine": "toy", "model": "", "dtype": "float32",
            "fingerprint": "0" * 64, "tokenizer": "0" * 64, "mask": self.mask.hash.hex(), "mask_bytes": len(blob),
            "mask_chunks": -(-len(blob) // 65536), "weights": weights, "stream": "mk1", "rounds": 1000,
            "local_steps": 1, "directions": 1, "lr": 0.1, "eps": 0.1, "batch_size": 1, "digest_every": 1,
        }  # fmt: skip
        self.run = RunDescriptor.model_validate(defaults | settings)
        self.replica = Replica(self.mask, run_id=RUN_ID, stream="mk1", digest_every=1)
        self.entries: list[Entry] = []
        self.has = {self.mask.hash: blob}
        self.offers_chunks = self.offers_entries = True
        self.statuses: list[NodeStatus] = []
        self.updates: list[Update] = []
        self.wants: list[Want] = []
        self.chunks: list[Chunk] = []
        self._link = 0
        self._retains_mask = retains_mask
        kinds = ("status", "update", "want")
        filters = [(TOPICS.up(NODE, kind), 1) for kind in kinds]  # type: ignore[arg-type]
        self.peer = Peer(broker, "server", filters, react=self._react)

    async def __aenter__(self) -> Self:
        await self.peer.connected()
        self.announce_server()
        self._publish(TOPICS.run, self.run.encode())
        for chunk in self.mask_chunks if self._retains_mask else ():
            self._publish(TOPICS.blob(chunk.blob, chunk.index), encode(chunk))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.peer.leave()

    def announce_server(self) -> None:
        """As a server does that connects anew: its nodes introduce themselves."""
        self._link += 1
        state = ServerState(
            status="online", run=self.run.run, term=1, server_id="0" * 16, link=self._link, host="hub", round=0
        )
        self._publish(TOPICS.server, state.encode())

    def announce(self, *, known: int = 1, asked: bool = True, **fields: Any) -> None:
        """Announce the round at the head, with the newest `known` entries."""
        opened: dict[str, Any] = {"steps": self.run.local_steps, "lanes": 1, "eps": 0.5, "deadline_ms": 1000}
        opened |= {
            "asked": frozenset({SLOT} if asked else ()),
            "entries": tuple(self.entries[-known:] if known else ()),
        }
        self._publish(TOPICS.round, encode(Round(self.header, True, **opened | fields)))

    def close(self, displacement: Float32Array | None = None) -> bytes:
        """Close a round; returns the blob of its displacement."""
        terms, blob, values = (Coefficient(0, 0, 0.5),), b"", None
        if displacement is not None:
            blob = encode_values(displacement, "float32")
            values = Displacement(short_hash(blob), len(blob))
            self.has[values.blob] = blob
            displacement = decode_values(blob, values.blob, self.mask.size)
        previous = self.entries[-1].hash(RUN_ID) if self.entries else self.mask.hash
        digest = self.replica.apply(terms, displacement)
        self.entries.append(Entry(len(self.entries), terms, previous, digest, values))
        return blob

    def push(self, blob: bytes) -> None:
        """Send a displacement's chunks to all."""
        for chunk in split(self.header, short_hash(blob), blob):
            self.peer.session.publish(TOPICS.values, encode(chunk))

    def say(self, frame: Frame) -> None:
        """Answer the node."""
        self.peer.session.publish(TOPICS.reply(NODE), encode(frame))

    @property
    def header(self) -> Header:
        return Header.of(RUN_ID, 1, len(self.entries), self.mask.hash)

    @property
    def mask_chunks(self) -> list[Chunk]:
        return split(self.header, self.mask.hash, self.has[self.mask.hash])

    @property
    def asked_chunks(self) -> list[tuple[bytes | None, tuple[int, ...]]]:
        """Of other blobs than the mask."""
        return [(want.blob, want.chunks) for want in self.wants if want.chunks and want.blob != self.mask.hash]

    async def stands_at(self, version: int) -> NodeStatus:
        """Wait until the node says that it stands at this version, with the right theta."""

        clock, again_at = asyncio.get_running_loop().time, 0.0

        def said() -> bool:
            nonlocal again_at
            if self.statuses and self.statuses[-1].version != version and clock() >= again_at:
                again_at = clock() + AGAIN_S
                self.announce_server()
            return bool(self.statuses) and self.statuses[-1].version == version

        await until(said, within_s=PATIENCE_S)
        assert self.statuses[-1].digest == self.entries[version - 1].digest.hex()
        return self.statuses[-1]

    async def status(self, *statuses: str) -> NodeStatus:
        """Wait until the node's state is one of these."""
        await until(lambda: self.statuses and self.statuses[-1].status in statuses, within_s=PATIENCE_S)
        return self.statuses[-1]

    async def update(self, count: int = 1) -> Update:
        """Wait for the n-th update."""
        await until(lambda: len(self.updates) >= count, within_s=PATIENCE_S)
        return self.updates[count - 1]

    async def update_from(self, version: int) -> None:
        """Wait for an update from theta of this version."""
        await until(lambda: version in [update.header.version for update in self.updates[-1:]], within_s=PATIENCE_S)

    def _react(self, message: Message) -> None:
        if message.topic.endswith("/status"):
            status = decode_control(message.payload, NodeStatus)
            self.statuses.append(status)
            if status.status == "online":
                self.say(Welcome(self.header, status.boot, SLOT))
            return
        match decode(message.payload):
            case Update() as update:
                self.updates.append(update)
            case Chunk() as chunk:
                self.chunks.append(chunk)
            case Want() as want:
                self.wants.append(want)
                self._help(want)

    def _help(self, want: Want) -> None:
        if want.welcome:
            self.say(Welcome(self.header, want.boot, SLOT))
        if want.entries_from is not None and self.offers_entries:
            self.say(Entries(self.header, tuple(self.entries[want.entries_from :])))
        kept = self._retains_mask and want.blob == self.mask.hash  # but not by every broker
        if want.blob in self.has and (self.offers_chunks or kept):
            chunks = split(self.header, want.blob, self.has[want.blob])
            for index in want.chunks:
                self.say(chunks[index])

    def _publish(self, topic: str, payload: bytes) -> None:
        self.peer.session.publish(topic, payload, retain=True)


@contextlib.asynccontextmanager
async def node(folder: Path, broker: BrokerConfig, **settings: Any) -> AsyncIterator["asyncio.Task[None]"]:
    """A node in this process; ended in order, or as the test ended it."""
    data = settings.pop("data", None)
    if data is None:
        data = folder / "rows.jsonl"
        data.write_text('{"seed": 1}\n')
    config = NodeConfig.model_validate(
        {"id": NODE, "federation": "f", "data": data, "state_dir": folder / "state", "broker": broker, **settings}
    )
    task = asyncio.create_task(run_node(config))
    try:
        yield task
        assert not task.done() or task.cancelled(), task.exception()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class Gate:
    """Stands before each local step of this process's toy engines.

    Attributes:
        begun: steps that came to it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = 0
        self._free = threading.Semaphore(0)
        self._open = False
        self._pause_s = 0.0
        prepare = QuadraticEngine.prepare

        def wait(engine: QuadraticEngine, rows: Sequence[Any]) -> Float32Array:
            self.begun += 1
            assert self._open or self._free.acquire(timeout=PATIENCE_S)
            time.sleep(self._pause_s)
            return prepare(engine, rows)

        monkeypatch.setattr(QuadraticEngine, "prepare", wait)

    def let_through(self, steps: int) -> None:
        self._free.release(steps)

    def open(self, *, pause_s: float = 0.0) -> None:
        self._open, self._pause_s = True, pause_s
        self._free.release(1)

    async def has_begun(self, steps: int) -> None:
        await until(lambda: self.begun >= steps, within_s=PATIENCE_S)
