"""A server by hand, that says to one node what a test wants it to hear."""

from dataclasses import replace
from typing import Any

from meerkat_mq.config import BrokerConfig
from meerkat_mq.core.path import Coefficient, Displacement, Entry, digest, short_hash
from meerkat_mq.core.replica import Replica
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.wire.arrays import encode_mask, split
from meerkat_mq.wire.descriptor import NodeStatus, RunDescriptor, ServerState, decode_control
from meerkat_mq.wire.frames import Chunk, Entries, Frame, Header, Round, Update, Want, Welcome, decode, encode
from meerkat_mq.wire.topics import Topics
from meerkat_mq.wire.values import decode_values
from tests.server.federation import NAME
from tests.support.peer import Peer
from tests.support.waiting import until

TOPICS = Topics(NAME)
NODE = "js-1"
RUN_ID = bytes(range(16))
SERVER_ID = "5" * 16
PATIENCE_S = 30.0


class Script(Peer):
    """Serves mask, welcome and entries by itself; the rest is up to the test.

    Attributes:
        updates: what the node sent.
        wants: likewise.
        statuses: likewise.
        entries: the ledger.
        blobs: that it gives when asked, by hash.
    """

    def __init__(self, broker: BrokerConfig, weights: int = 50, **rules: Any) -> None:
        self.mask = toy_mask(weights)
        self.replica = Replica(self.mask, run_id=RUN_ID, stream="mk1", digest_every=1)
        self.term = 1
        self.updates: list[Update] = []
        self.wants: list[Want] = []
        self.statuses: list[NodeStatus] = []
        self.entries: list[Entry] = []
        self.blobs = {self.mask.hash: encode_mask(self.mask)}
        self._welcomed: set[int] = set()
        self.rules = {"steps": 2, "lanes": 1, "eps": 2.0**-10, "deadline_ms": 60_000, **rules}
        super().__init__(
            broker, "script", [(TOPICS.up(NODE, kind), 1) for kind in ("update", "want", "status")], react=self._see
        )

    def _see(self, message: Any) -> None:
        if message.topic == TOPICS.up(NODE, "status"):
            self._see_status(decode_control(message.payload, NodeStatus))
            return
        frame = decode(message.payload)
        if isinstance(frame, Update):
            self.updates.append(frame)
        elif isinstance(frame, Want):
            self.wants.append(frame)
            self._answer(frame)

    def _see_status(self, status: NodeStatus) -> None:
        self.statuses.append(status)
        if status.status == "online" and status.boot not in self._welcomed:
            self._welcomed.add(status.boot)
            self.reply(Welcome(self.header, status.boot, 0))
            self.announce()

    def _answer(self, want: Want) -> None:
        if want.welcome and want.header.term <= self.term:
            self.reply(Welcome(self.header, want.boot, 0))
            self.announce()
        if want.entries_from is not None:
            self.reply(Entries(self.header, tuple(self.entries[want.entries_from :])))
        for chunk in self.chunks(want.blob) if want.blob is not None and want.blob in self.blobs else []:
            if chunk.index in want.chunks:
                self.reply(chunk)

    @property
    def header(self) -> Header:
        return Header.of(RUN_ID, self.term, len(self.entries), self.mask.hash)

    @property
    def digest(self) -> bytes:
        """Of the head's theta."""
        return digest(self.replica.theta)

    def chunks(self, name: bytes) -> list[Chunk]:
        return split(self.header, name, self.blobs[name])

    def reply(self, frame: Frame) -> None:
        self.session.publish(TOPICS.reply(NODE), encode(frame))

    def describe(self, **settings: Any) -> None:
        """The run and its server."""
        run = RunDescriptor(
            federation=NAME, run=RUN_ID.hex(), engine="toy", model="toy", dtype="float32", fingerprint="0" * 64,
            tokenizer="0" * 64, mask=self.mask.hash.hex(), mask_bytes=len(self.blobs[self.mask.hash]),
            mask_chunks=len(self.chunks(self.mask.hash)), weights=self.mask.size, stream="mk1", rounds=1000,
            local_steps=2, directions=1, lr=0.5, eps=2.0**-10, batch_size=2, digest_every=1, **settings,
        )  # fmt: skip
        self.session.publish(TOPICS.run, run.encode(), retain=True)
        self.lead(SERVER_ID)

    def lead(self, server_id: str, link: int = 1) -> None:
        """Say who serves, on which connection."""
        state = ServerState(
            status="online", run=RUN_ID.hex(), term=self.term, server_id=server_id, link=link, host="here", round=0
        )
        self.session.publish(TOPICS.server, state.encode(), retain=True)

    def announce(self, **changes: Any) -> None:
        """The open round, with the newest entry."""
        frame = Round(self.header, is_open=True, asked=frozenset({0}), entries=tuple(self.entries[-1:]), **self.rules)
        self.session.publish(TOPICS.round, encode(replace(frame, **changes)), retain=True)

    def push(self, *indices: int) -> None:
        """Chunks of the newest entry's displacement, to all."""
        displacement = self.entries[-1].displacement
        assert displacement is not None
        for chunk in self.chunks(displacement.blob):
            if not indices or chunk.index in indices:
                self.session.publish(TOPICS.values, encode(chunk))

    def close(self, *terms: Coefficient, values: bytes | None = None) -> None:
        """Add an entry, with what a values blob decodes to; the node is told by `announce`."""
        added = decode_values(values, None, self.mask.size) if values is not None else None
        displacement = Displacement(short_hash(values), len(values)) if values is not None else None
        if values is not None:
            self.blobs[short_hash(values)] = values
        previous = self.entries[-1].hash(RUN_ID) if self.entries else self.mask.hash
        after = self.replica.apply(terms, added)
        self.entries.append(Entry(len(self.entries), terms, previous, after, displacement))

    def start_over(self, term: int) -> None:
        """Another past, under this term."""
        self.term, self.entries = term, []
        self.replica.reset()

    def asked_for_displacements(self) -> list[Want]:
        """Those of the wants."""
        return [want for want in self.wants if want.blob not in (None, self.mask.hash)]

    async def hears_update(self, version: int, *, times: int = 1) -> Update:
        """Wait for the n-th update from theta of this version; its base is that theta's digest."""

        def found() -> list[Update]:
            return [update for update in self.updates if update.header.version == version]

        await until(lambda: len(found()) >= times, within_s=PATIENCE_S)
        return found()[times - 1]
