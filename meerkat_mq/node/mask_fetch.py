"""Getting the run's mask: kept from an earlier start, retained by the broker, or asked of the server."""

import asyncio

import structlog

from meerkat_mq.core.mask import Mask
from meerkat_mq.errors import BadValue, WireError
from meerkat_mq.mqtt import Session
from meerkat_mq.node.state import NodeState
from meerkat_mq.wire.arrays import Assembly, decode_mask
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.frames import encode
from meerkat_mq.wire.messages import Chunk, Header, Want
from meerkat_mq.wire.topics import Topics

PATIENCE_S = 3.0
CHUNKS_A_WANT = 16


class MaskFetch:
    """Collects the chunks of one run's mask; `add` is called for every chunk that arrives."""

    def __init__(self, descriptor: RunDescriptor, session: Session, topics: Topics, node: str, boot: int) -> None:
        self._descriptor = descriptor
        self._session = session
        self._topics = topics
        self._node = node
        self._boot = boot
        self._arrived = asyncio.Event()
        self._assembly = self._fresh()

    def _fresh(self) -> Assembly:
        run = self._descriptor
        return Assembly(run.mask_hash, run.mask_bytes, run.mask_chunks)

    def add(self, chunk: Chunk) -> None:
        """Take a chunk.

        Raises:
            BadValue: it is of another blob.
        """
        self._assembly.add(chunk)
        self._arrived.set()

    async def fetch(self, state: NodeState) -> Mask:
        """The mask, however long it takes; asks the server for what the broker does not give."""
        kept = await asyncio.to_thread(state.load_mask, self._descriptor.mask_hash)
        if kept is not None:
            return kept
        filters = self._topics.blobs(self._descriptor.mask_hash)
        self._session.subscribe(filters)
        try:
            mask = await self._collect()
        finally:
            self._session.unsubscribe(filters)
        await asyncio.to_thread(state.keep_mask, mask)
        return mask

    async def _collect(self) -> Mask:
        run, unasked = self._descriptor, True
        while True:
            await self._complete(unasked=unasked)
            try:
                return await asyncio.to_thread(decode_mask, self._assembly.join(), run.mask_hash, run.weights)
            except WireError as error:
                structlog.get_logger().warning("mask refused, fetching it again", problem=str(error))
                self._assembly, unasked = self._fresh(), False

    async def _complete(self, *, unasked: bool) -> None:
        """Wait for all chunks; where they do not come unasked, from the broker, ask the server, part by part."""
        asked: frozenset[int] | None = None if unasked else frozenset()
        while missing := self._assembly.missing:
            if asked is not None and asked.isdisjoint(missing):
                asked = self._ask(missing)
            elif not await self._one_arrives():
                asked = frozenset()

    async def _one_arrives(self) -> bool:
        self._arrived.clear()
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._arrived.wait()
        except TimeoutError:
            return False

    def _ask(self, missing: tuple[int, ...]) -> frozenset[int]:
        """Ask the server for the first chunks that lack; returns which."""
        run, chunks = self._descriptor, missing[:CHUNKS_A_WANT]
        want = Want(Header.of(run.run_id, 0, 0, run.mask_hash), self._boot, blob=run.mask_hash, chunks=chunks)
        structlog.get_logger().info("asking for the mask", node=self._node, missing=len(missing))
        self._session.publish(self._topics.up(self._node, "want"), encode(want))
        return frozenset(chunks)


def check_descriptor(descriptor: RunDescriptor, federation: str) -> None:
    """Refuse, as WireError, a descriptor that no server can mean."""
    if descriptor.federation != federation:
        raise BadValue("RunDescriptor.federation", f"{descriptor.federation} is not {federation}")
    if descriptor.engine == "transformers" and descriptor.task is None:
        raise BadValue("RunDescriptor.task", "is missing")
    if descriptor.mask_bytes > 16 * descriptor.weights + 2**20:
        raise BadValue("RunDescriptor.mask_bytes", f"{descriptor.mask_bytes} bytes for {descriptor.weights} weights")
    Assembly(descriptor.mask_hash, descriptor.mask_bytes, descriptor.mask_chunks)
