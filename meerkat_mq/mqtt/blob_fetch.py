"""Getting a blob from the server by `want`, part by part, in bounded memory."""

import asyncio
from collections.abc import Callable

from meerkat_mq.errors import NotConnected
from meerkat_mq.wire.arrays import Assembly
from meerkat_mq.wire.frames import MAX_CHUNK_BYTES
from meerkat_mq.wire.messages import Chunk

PATIENCE_S = 3.0  # at first; on slow links, chunks are waited for twice as long as the newest took
LONGEST_PATIENCE_S = 60.0
CHUNKS_A_WANT = 16


class BlobFetch:
    """Collects the chunks of one blob; `add` is called for every chunk that arrives.

    It asks for some chunks at a time. After a silence it asks for the last of them only, and waits
    twice as long. If another chunk comes first, the chunks are still on their way, and asking again would clog a slow
    link. If not, they were lost.

    Args:
        name: the blob's hash, 16 bytes.
        size: its bytes.
        ask: asks the server for these chunks.

    Attributes:
        name: as given.
        size: as given.
        silences: how many there were since the newest chunk.

    Raises:
        TooLarge: larger than a blob can be.
    """

    def __init__(self, name: bytes, size: int, ask: Callable[[tuple[int, ...]], None]) -> None:
        self.name = name
        self.size = size
        self.silences = 0
        self._ask = ask
        self._asked: frozenset[int] | None = None  # None: what lacks comes without being asked for again
        self._has_asked = False
        self._woken = asyncio.Event()
        self._news_at = self._asked_at = _now()
        self._chunk_s = 0.0  # that the newest chunk took
        self._patience_s = PATIENCE_S
        self._assembly = self._fresh()

    def _fresh(self) -> Assembly:
        return Assembly(self.name, self.size, -(-self.size // MAX_CHUNK_BYTES))

    def add(self, chunk: Chunk) -> None:
        """Take a chunk.

        Raises:
            BadValue: it is of another blob.
        """
        if not self._assembly.add(chunk):
            return
        now = _now()
        self._chunk_s, self._news_at, self.silences = now - self._news_at, now, 0
        self._patience_s = self._usual_patience_s
        if self._asked is not None and chunk.index not in self._asked:
            self._asked = None
        self._woken.set()

    def start_over(self) -> None:
        """Forget all chunks: together they were not the blob."""
        self._assembly = self._fresh()

    def ask_again(self) -> None:
        """What was asked, or its answer, went with a connection; does nothing before the first question."""
        if self._has_asked:
            self._asked, self._patience_s = frozenset(), self._usual_patience_s
            self._woken.set()

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
        while missing := self._assembly.missing:
            if self._asked is not None and self._asked.isdisjoint(missing):
                self._question(missing[:CHUNKS_A_WANT])
            elif not await self._is_woken():
                self.silences += 1
                if self.silences == silences:
                    problem = f"{len(missing)} chunks did not come, and none in the last {self._patience_s:g} s"
                    raise NotConnected(f"blob {self.name.hex()}", problem)
                self._patience_s = min(2 * self._patience_s, LONGEST_PATIENCE_S)
                self._question(missing[-1:])
        return self._assembly.join()

    @property
    def _usual_patience_s(self) -> float:
        return min(max(PATIENCE_S, 2 * self._chunk_s), LONGEST_PATIENCE_S)

    def _question(self, chunks: tuple[int, ...]) -> None:
        self._ask(chunks)
        self._asked, self._has_asked, self._asked_at = frozenset(chunks), True, _now()

    async def _is_woken(self) -> bool:
        """Wait for what comes, but not for longer than patience lasts since the newest chunk or question."""
        try:
            async with asyncio.timeout_at(max(self._news_at, self._asked_at) + self._patience_s):
                await self._woken.wait()
        except TimeoutError:
            return False
        self._woken.clear()
        return True


def _now() -> float:
    return asyncio.get_running_loop().time()
