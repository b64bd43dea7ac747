"""Getting a blob from the server by `want`, part by part, in bounded memory."""

import asyncio
from collections.abc import Callable

from meerkat_mq.errors import NotConnected
from meerkat_mq.wire.arrays import Assembly
from meerkat_mq.wire.frames import MAX_CHUNK_BYTES
from meerkat_mq.wire.messages import Chunk

PATIENCE_S = 3.0
CHUNKS_A_WANT = 16


class BlobFetch:
    """Collects the chunks of one blob; `add` is called for every chunk that arrives.

    Args:
        name: the blob's hash, 16 bytes.
        size: its bytes.
        ask: asks the server for these chunks.

    Attributes:
        name: as given.
        size: as given.
        silences: how many times `PATIENCE_S` have passed without a new chunk, up to now.

    Raises:
        TooLarge: larger than a blob can be.
    """

    def __init__(self, name: bytes, size: int, ask: Callable[[tuple[int, ...]], None]) -> None:
        self.name = name
        self.size = size
        self.silences = 0
        self._ask = ask
        self._asked: frozenset[int] | None = None
        self._arrived = asyncio.Event()
        self._quiet_since = _now()
        self._assembly = self._fresh()

    def _fresh(self) -> Assembly:
        return Assembly(self.name, self.size, -(-self.size // MAX_CHUNK_BYTES))

    def add(self, chunk: Chunk) -> None:
        """Take a chunk.

        Raises:
            BadValue: it is of another blob.
        """
        if self._assembly.add(chunk):
            self._quiet_since = _now()
            self._arrived.set()

    def start_over(self) -> None:
        """Forget all chunks: together they were not the blob."""
        self._assembly = self._fresh()

    def ask_again(self) -> None:
        """What was asked, or its answer, went with a connection; does nothing before the first question."""
        if self._asked is not None:
            self._asked = frozenset()
            self._arrived.set()

    async def collect(self, *, unasked: bool = False, silences: int | None = None) -> bytes:
        """The whole blob.

        Args:
            unasked: whether chunks may come by themselves, so that asking can wait for the first silence, which may
                have begun before.
            silences: how many times `PATIENCE_S` without a new chunk may pass in a row; None: any number.

        Raises:
            NotConnected: too many passed.
        """
        self._asked = None if unasked else frozenset()
        self.silences = 0
        while missing := self._assembly.missing:
            if self._asked is not None and self._asked.isdisjoint(missing):
                part = missing[:CHUNKS_A_WANT]
                self._ask(part)
                self._quiet_since = _now()
                self._asked = frozenset(part)
            elif await self._one_arrives():
                self.silences = 0
            else:
                self._asked, self.silences = frozenset(), self.silences + 1
                if self.silences == silences:
                    problem = f"{len(missing)} chunks did not come within {silences * PATIENCE_S:g} s"
                    raise NotConnected(f"blob {self.name.hex()}", problem)
        return self._assembly.join()

    async def _one_arrives(self) -> bool:
        try:
            async with asyncio.timeout_at(self._quiet_since + PATIENCE_S):
                await self._arrived.wait()
        except TimeoutError:
            return False
        self._arrived.clear()
        return True


def _now() -> float:
    return asyncio.get_running_loop().time()
