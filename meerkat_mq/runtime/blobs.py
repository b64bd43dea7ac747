"""What a node gets and gives chunk by chunk, in bounded memory."""

from collections.abc import Callable
from dataclasses import replace

import structlog

from meerkat_mq.core.path import Displacement
from meerkat_mq.core.seldom import Seldom
from meerkat_mq.errors import TooLarge
from meerkat_mq.runtime.blob_fetch import BlobFetch
from meerkat_mq.runtime.model import KeptUpdate
from meerkat_mq.runtime.ports import Clock
from meerkat_mq.wire.arrays import chunks_of, split
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.messages import Chunk, Header, Want
from meerkat_mq.wire.values import largest_blob

MOST_PUSHED = 32  # however small they are


class Blobs:
    """The blobs of one run: one that is being fetched, the newest displacements that come unasked, and one to give.

    Of those that come unasked as many are kept as have room where the largest two would have it.

    Args:
        run: the run.
        boot: of this process.
        send: sends to the server.
        clock: for silences.
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
        """From now on, chunks are taken for this blob; those that came unasked are there already.

        Raises:
            TooLarge: larger than a blob can be.
        """
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
        """Take a chunk that was asked for.

        Raises:
            BadValue: it is of another blob than the one that is being fetched.
        """
        if self._fetch is not None:
            self._fetch.add(chunk)

    def expect(self, displacement: Displacement) -> None:
        """The chunks of this displacement are on their way to everybody.

        Raises:
            TooLarge: larger than a displacement can be.
        """
        if self._fetch is None or self._fetch.name != displacement.blob:
            self._coming(displacement.blob, displacement.size)

    def take_pushed(self, chunk: Chunk) -> None:
        """Take a chunk of a displacement, which the server sends to all.

        Raises:
            WireError: it does not fit the others, or is of a blob larger than a displacement can be.
        """
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
