"""Getting a blob from the server by `want`, part by part, in bounded memory."""

import asyncio
from collections.abc import Callable

from meerkat_mq.errors import NotConnected
from meerkat_mq.wire.arrays import Assembly
from meerkat_mq.wire.frames import MAX_CHUNK_BYTES
from meerkat_mq.wire.messages import Chunk

PATIENCE_S = 3.0  # at first; on slow links, chunks are waited for twice as long as the newest took
CHUNKS_A_WANT = 16


class BlobFetch:
    """Collects the chunks of one blob; `add` is called for every chunk that arrives.

    It asks for some chunks at a time. After a silence it asks for one alone, the last, and waits twice as long: where
    another one comes before it, those that were asked for are still on their way, and asking again would clog a slow
    link; else they were lost.

    Args:
        name: the blob's hash, 16 bytes.
        size: its bytes.
        ask: asks the server for these chunks.

    Attributes:
        name: as given.
        size: as given.
        silences: in a row up to now, in each of which no new chunk came.

    Raises:
        TooLarge: larger than a blob can be.
    """

    def __init__(self, name: bytes, size: int, ask: Callable[[tuple[int, ...]], None]) -> None:
        self.name = name
        self.size = size
        self.silences = 0
        self._ask = ask
        self._asked: frozenset[int] | None = None  # None: what lacks comes without being asked for
        self._arrived = asyncio.Event()
        self._quiet_since = self._news_at = _now()
        self._patience_s = PATIENCE_S
        self._assembly = self._fresh()

    def _fresh(self) -> Assembly:
        return Assembly(self.name, self.size, -(-self.size // MAX_CHUNK_BYTES))

    def add(self, chunk: Chunk) -> None:
        """Take a chunk.

        Raises:
            BadValue: it is of another blob.
        """
        if self._assembly.add(chunk):
            now = _now()
            self._patience_s = max(PATIENCE_S, 2 * (now - self._news_at))
            self._quiet_since = self._news_at = now
            if self._asked is not None and chunk.index not in self._asked:
                self._asked = None
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
            silences: how many may pass in a row; None: any number.

        Raises:
            NotConnected: too many passed.
        """
        self._asked = None if unasked else frozenset()
        self.silences = 0
        while missing := self._assembly.missing:
            if self._asked is not None and self._asked.isdisjoint(missing):
                self._asked = self._question(missing[:CHUNKS_A_WANT])
                self._news_at = self._quiet_since
            elif await self._one_arrives():
                self.silences = 0
            elif self.silences + 1 == silences:
                problem = f"{len(missing)} chunks did not come, and none in the last {self._patience_s:g} s"
                raise NotConnected(f"blob {self.name.hex()}", problem)
            else:
                self.silences += 1
                self._patience_s *= 2
                self._asked = self._question(missing[-1:])
        return self._assembly.join()

    def _question(self, chunks: tuple[int, ...]) -> frozenset[int]:
        self._ask(chunks)
        self._quiet_since = _now()
        return frozenset(chunks)

    async def _one_arrives(self) -> bool:
        try:
            async with asyncio.timeout_at(self._quiet_since + self._patience_s):
                await self._arrived.wait()
        except TimeoutError:
            return False
        self._arrived.clear()
        return True


def _now() -> float:
    return asyncio.get_running_loop().time()
