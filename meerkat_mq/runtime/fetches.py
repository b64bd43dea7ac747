"""Displacements that values nodes announce: got chunk by chunk, checked, and handed on to be kept."""

import math
from collections.abc import Callable
from typing import Protocol

import structlog

from meerkat_mq.core.seldom import Seldom
from meerkat_mq.errors import BadValue, MeerkatError, WireError, reason
from meerkat_mq.ledger.displacement import verdict_on
from meerkat_mq.rounds.events import FetchValues, ServerEvent, ValuesFetched
from meerkat_mq.rounds.records import Verdict
from meerkat_mq.runtime.blobs import BlobFetch
from meerkat_mq.runtime.ports import Clock, Compute
from meerkat_mq.runtime.steps import Sequence, Steps, until, work
from meerkat_mq.runtime.writer import KeepValues
from meerkat_mq.wire.messages import Chunk, Header, Update, Want
from meerkat_mq.wire.values import decode_values, largest_blob

AT_ONCE = 64
MEMORY_BYTES = 256 * 2**20  # of displacements on their way
SILENCES = 4
LONGEST_S = 240.0  # in which a link of 22 kB/s brings 5 MB; else few slower ones hold up all others


class Asker(Protocol):
    """Whom the fetches belong to."""

    def handle(self, event: ServerEvent) -> None:
        """A displacement did not come, or is none."""

    def reply(self, node: str, frame: Want) -> bool:
        """Ask a node for chunks."""

    def header(self) -> Header:
        """The header of questions."""


class Fetches:
    """Gets what it is told to, of one node one at a time and the newest, of all nodes in bounded memory and time.

    Args:
        weights: n.
        keep: takes a displacement that decodes, and what the guards say of it.
        reach: the largest root mean square of a displacement, by its local steps.
        wasted: is told of a node, and of its bytes that were no displacement; they may be none.
    """

    def __init__(
        self,
        weights: int,
        owner: Asker,
        keep: Callable[[KeepValues], None],
        reach: Callable[[int], float] = lambda steps: math.inf,
        wasted: Callable[[str, int], None] = lambda node, size: None,
        *,
        compute: Compute,
        clock: Clock,
    ) -> None:
        self._seldom = Seldom()
        self._weights = weights
        self._reach = reach
        self._wasted = wasted
        self._owner = owner
        self._keep = keep
        self._compute = compute
        self._clock = clock
        self._room = max(1, min(AT_ONCE, MEMORY_BYTES // largest_blob(weights)))
        self._orders: dict[str, FetchValues] = {}
        self._going: dict[str, Sequence[None]] = {}
        self._open: dict[str, BlobFetch] = {}

    def put(self, order: FetchValues) -> None:
        """Get this; what is still to come from the same node is given up."""
        self._give_up(order.node)
        self._orders[order.node] = order
        self._begin_more()

    def forget(self) -> None:
        """Give up everything: the machine that asked for it is no more."""
        self._orders.clear()
        for node in list(self._going):
            self._give_up(node)

    def _give_up(self, node: str) -> None:
        self._orders.pop(node, None)
        self._open.pop(node, None)
        if (going := self._going.pop(node, None)) is not None:
            going.cancel()

    def add(self, node: str, chunk: Chunk) -> bool:
        """A chunk arrived from a node; BadValue where nobody asked for it.

        Returns:
            Whether it is due: all may come twice, as MQTT repeats what was on its way, and no more.
        """
        fetch = self._open.get(node)
        if fetch is None:
            raise BadValue("chunk", f"{chunk.index} of {chunk.blob.hex()} was not asked for")
        fetch.add(chunk)
        return fetch.repeats <= chunk.count

    def _begin_more(self) -> None:
        while self._orders and len(self._going) < self._room:
            order = self._orders.pop(next(iter(self._orders)))
            self._going[order.node] = Sequence(self._get(order))

    def _get(self, order: FetchValues) -> Steps[None]:
        yield from until(self._clock, self._clock.now())  # whoever orders it has something else to do first
        came, blob = False, b""
        try:
            blob = yield from self._collect(order)
            yield from self._hand_on(order.node, order.update, blob)
            came = True
        except Exception as error:  # whatever a node's bytes make of a decoder, or of memory: it ends no server
            said = {"node": order.node, "problem": str(error) if isinstance(error, MeerkatError) else reason(error)}
            say = structlog.get_logger().warning
            self._seldom.say(say, "displacement dropped", order.node, type(error).__name__, **said)
            if isinstance(error, WireError):
                self._wasted(order.node, len(blob))
        self._going.pop(order.node, None)
        if not came:
            self._owner.handle(ValuesFetched(self._clock.now(), order.node, order.update, None))
        self._begin_more()

    def _collect(self, order: FetchValues) -> Steps[bytes]:
        update, announced = order.update, order.update.values
        assert announced is not None
        if announced.size > largest_blob(self._weights):
            raise BadValue("values", f"{announced.size} bytes are announced for {self._weights} weights")

        def ask(chunks: tuple[int, ...]) -> None:
            want = Want(self._owner.header(), update.boot, blob=announced.blob, chunks=chunks)
            self._owner.reply(order.node, want)

        fetch = self._open[order.node] = BlobFetch(announced.blob, announced.size, ask, self._clock)
        timer = self._clock.at(self._clock.now() + LONGEST_S, fetch.give_up)
        try:
            return (yield from fetch.collect(silences=SILENCES))
        finally:
            timer.cancel()
            if self._open.get(order.node) is fetch:
                del self._open[order.node]

    def _hand_on(self, node: str, update: Update, blob: bytes) -> Steps[None]:
        """Check it, and have it kept: until then it takes up room, also where the ledger's disk is full."""
        verdict = yield from work(self._compute, self._verdict, update, blob)
        yield lambda done, _: self._keep(KeepValues(node, update, blob, verdict, done))

    def _verdict(self, update: Update, blob: bytes) -> Verdict:
        assert update.values is not None
        displacement = decode_values(blob, update.values.blob, self._weights)
        return verdict_on(displacement, update.loss, self._reach(update.values.steps))
