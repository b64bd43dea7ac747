"""Blobs, got by `want` and given chunk by chunk, in bounded memory.

A fetch asks for some chunks at a time. After a silence it asks for the last of them only, and waits twice as long. If
another chunk comes first, the chunks are still on their way, and asking again would clog a slow link. If not, they were
lost.
"""

from collections.abc import Callable
from dataclasses import replace

import structlog

from meerkat_mq.core.path import Displacement
from meerkat_mq.core.seldom import Seldom
from meerkat_mq.errors import NotConnected, TooLarge
from meerkat_mq.runtime.model import KeptUpdate
from meerkat_mq.runtime.ports import Clock, Failed, Timer
from meerkat_mq.runtime.steps import Done, Steps
from meerkat_mq.wire.arrays import Assembly, chunks_of, split
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.frames import MAX_CHUNK_BYTES
from meerkat_mq.wire.messages import Chunk, Header, Want
from meerkat_mq.wire.values import largest_blob

PATIENCE_S = 3.0  # at first; on slow links, chunks are waited for twice as long as the newest took
LONGEST_PATIENCE_S = 60.0
CHUNKS_A_WANT = 16
MOST_PUSHED = 32  # displacements that come unasked, however small they are


class BlobFetch:
    """Collects the chunks of one blob; `add` is called for every chunk that arrives. TooLarge: no blob is.

    Args:
        name: the blob's hash, 16 bytes.
        ask: asks whoever has it for these chunks.

    Attributes:
        silences: how many there were since the newest chunk.
        repeats: how many chunks came that were there already.
    """

    def __init__(self, name: bytes, size: int, ask: Callable[[tuple[int, ...]], None], clock: Clock) -> None:
        self.name = name
        self.size = size
        self.silences = 0
        self.repeats = 0
        self._ask = ask
        self._clock = clock
        self._asked: frozenset[int] | None = None  # None: what lacks comes without being asked for again
        self._has_asked = False
        self._most_silences: int | None = None
        self._timer: Timer | None = None
        self._ends: tuple[Done, Failed] | None = None  # while somebody collects
        self._news_at = self._asked_at = self._began = clock.now()
        self._chunk_s = 0.0  # that the newest chunk took
        self._patience_s = PATIENCE_S
        self._assembly = self._fresh()

    def _fresh(self) -> Assembly:
        return Assembly(self.name, self.size, -(-self.size // MAX_CHUNK_BYTES))

    def add(self, chunk: Chunk) -> None:
        """Take a chunk; BadValue where it is of another blob."""
        if not self._assembly.add(chunk):
            self.repeats += 1
            return
        now = self._clock.now()
        self._chunk_s, self._news_at, self.silences = now - self._news_at, now, 0
        self._patience_s = self._usual_patience_s
        if self._asked is not None and chunk.index not in self._asked:
            self._asked = None
        self._look()

    def start_over(self) -> None:
        """Forget all chunks: together they were not the blob."""
        self._assembly = self._fresh()

    def ask_again(self) -> None:
        """What was asked, or its answer, went with a connection; does nothing before the first question."""
        if self._has_asked:
            self._asked, self._patience_s = frozenset(), self._usual_patience_s
            self._look()

    def give_up(self) -> None:
        """It takes too long: whoever collects it fails, as NotConnected."""
        self._fail(f"did not come whole within {self._clock.now() - self._began:g} s")

    def _fail(self, problem: str) -> None:
        if self._ends is not None:
            _, failed = self._ends
            self.stop()
            failed(NotConnected(f"blob {self.name.hex()}", problem))

    def stop(self) -> None:
        """Nobody collects it any more."""
        self._ends = None
        if self._timer is not None:
            self._timer.cancel()

    def collect(self, *, unasked: bool = False, silences: int | None = None) -> Steps[bytes]:
        """The whole blob.

        Args:
            unasked: whether chunks may come by themselves, so that asking can wait for the first silence, which may
                have begun before.
            silences: how many may pass in a row; None: any number.

        Raises:
            NotConnected: too many passed.
        """
        self._asked, self._most_silences = None if unasked else frozenset(), silences
        try:
            blob: bytes = yield self._begin
        finally:
            self.stop()
        return blob

    def _begin(self, done: Done, failed: Failed) -> None:
        self._ends = done, failed
        self._look()

    def _look(self) -> None:
        """Hand the whole blob over, or ask for what lacks, or wait."""
        if self._ends is None:
            return
        missing = self._assembly.missing
        if not missing:
            done, _ = self._ends
            self.stop()
            done(self._assembly.join())
            return
        if self._asked is not None and self._asked.isdisjoint(missing):
            self._question(missing[:CHUNKS_A_WANT])
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._clock.at(max(self._news_at, self._asked_at) + self._patience_s, self._silent)

    def _silent(self) -> None:
        if self._ends is None:
            return
        missing = self._assembly.missing
        self.silences += 1
        if self.silences == self._most_silences:
            self._fail(f"{len(missing)} chunks did not come, and none in the last {self._patience_s:g} s")
            return
        self._patience_s = min(2 * self._patience_s, LONGEST_PATIENCE_S)
        self._question(missing[-1:])
        self._look()

    @property
    def _usual_patience_s(self) -> float:
        return min(max(PATIENCE_S, 2 * self._chunk_s), LONGEST_PATIENCE_S)

    def _question(self, chunks: tuple[int, ...]) -> None:
        self._asked, self._has_asked, self._asked_at = frozenset(chunks), True, self._clock.now()
        self._ask(chunks)


class Blobs:
    """The blobs of one run: one that is being fetched, the newest displacements that come unasked, and one to give.

    Of those that come unasked as many are kept as have room where the largest two would have it.
    """

    def __init__(self, run: RunDescriptor, boot: int, send: Callable[[Want | Chunk], None], clock: Clock) -> None:
        self._header = Header.of(run.run_id, 0, 0, run.mask_hash)
        self._largest_pushed = largest_blob(run.weights)
        self._boot = boot
        self._seldom = Seldom()
        self._send = send
        self._clock = clock
        self._fetch: BlobFetch | None = None
        self._pushed: dict[bytes, BlobFetch] = {}  # by name, the newest last
        self._own: list[Chunk] = []

    def begin(self, name: bytes, size: int) -> BlobFetch:
        """From now on, chunks are taken for this blob; those that came unasked are there. TooLarge: no blob is."""
        pushed = self._pushed.pop(name, None)
        self._fetch = pushed if pushed is not None and pushed.size == size else self._new(name, size)
        return self._fetch

    def comes_unasked(self, name: bytes) -> bool:
        """Whether this blob was announced just now, or chunks of it came, before it was begun."""
        return name in self._pushed

    @property
    def arriving(self) -> bool:
        """Whether a blob is being fetched, and does not keep its chunks waiting."""
        return self._fetch is not None and self._fetch.silences == 0

    def end(self) -> None:
        """No blob is being fetched."""
        self._fetch = None

    def ask_again(self) -> None:
        """A connection is new, this node's or the server's; what was asked on another may be lost."""
        if self._fetch is not None:
            self._fetch.ask_again()

    def take(self, chunk: Chunk) -> None:
        """Take a chunk that was asked for; BadValue where it is of another blob."""
        if self._fetch is not None:
            self._fetch.add(chunk)

    def expect(self, displacement: Displacement) -> None:
        """The chunks of this displacement are on their way to everybody; TooLarge where none can be so large."""
        if self._fetch is None or self._fetch.name != displacement.blob:
            self._coming(displacement.blob, displacement.size)

    def take_pushed(self, chunk: Chunk) -> None:
        """Take a chunk of a displacement, which the server sends to all; WireError where it does not fit the others."""
        if self._fetch is not None and self._fetch.name == chunk.blob:
            self._fetch.add(chunk)
        else:
            self._coming(chunk.blob, chunk.size).add(chunk)

    def _coming(self, name: bytes, size: int) -> BlobFetch:
        """The one that collects this displacement; the oldest make room for a new one."""
        if name in self._pushed:
            return self._pushed[name]
        if size > self._largest_pushed:
            raise TooLarge("displacement", f"has {size} bytes, more than {self._largest_pushed}")
        coming = self._pushed[name] = self._new(name, size)
        while (
            len(self._pushed) > MOST_PUSHED
            or sum(pushed.size for pushed in self._pushed.values()) > 2 * self._largest_pushed
        ):
            del self._pushed[next(iter(self._pushed))]
        return coming

    def give(self, kept: KeptUpdate | None) -> None:
        """Have the displacement of this update to give, and no other."""
        values = kept.update.values if kept is not None else None
        self._own = split(self._header, values.blob, kept.blob) if kept is not None and values is not None else []

    def answer(self, want: Want) -> None:
        """Send the chunks that the server asks for, if they are of the blob that there is to give."""
        own = self._own if self._own and self._own[0].blob == want.blob else []
        for index in chunks_of(want, len(own)):
            chunk = own[index]
            self._send(replace(chunk, header=replace(chunk.header, term=want.header.term)))

    def _new(self, name: bytes, size: int) -> BlobFetch:
        def ask(chunks: tuple[int, ...]) -> None:
            say, said = structlog.get_logger().info, {"first": chunks[0], "count": len(chunks)}
            self._seldom.say(say, "asking for chunks", name, blob=name.hex()[:8], **said)
            self._send(Want(self._header, self._boot, blob=name, chunks=chunks))

        return BlobFetch(name, size, ask, self._clock)
