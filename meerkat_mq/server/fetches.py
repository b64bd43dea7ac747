"""Displacements that values nodes announce: got chunk by chunk, checked, and handed on to be kept."""

import asyncio
import math
from collections.abc import Callable

import structlog

from meerkat_mq.core.seldom import Seldom
from meerkat_mq.errors import BadValue, NotConnected, WireError
from meerkat_mq.ledger.displacement import verdict_on
from meerkat_mq.mqtt.blob_fetch import BlobFetch
from meerkat_mq.rounds.events import FetchValues, ValuesMissed
from meerkat_mq.rounds.records import Verdict
from meerkat_mq.server.scribe import Desk, KeepValues
from meerkat_mq.wire.messages import Chunk, Update, Want
from meerkat_mq.wire.values import decode_values, largest_blob

AT_ONCE = 64
MEMORY_BYTES = 256 * 2**20  # of displacements on their way
SILENCES = 4
LONGEST_S = 240.0  # in which a link of 22 kB/s brings 5 MB; else few slower ones hold up all others


class Fetches:
    """Gets what it is told to, of one node one at a time and the newest, of all nodes in bounded memory and time.

    Args:
        weights: n.
        desk: asks the nodes, and is told of a displacement that did not come, or is none.
        keep: takes one that decodes, and what the guards say of it.
        reach: the largest root mean square of a displacement, by its local steps.
    """

    def __init__(
        self,
        weights: int,
        desk: Desk,
        keep: Callable[[KeepValues], None],
        reach: Callable[[int], float] = lambda steps: math.inf,
    ) -> None:
        self._seldom = Seldom()
        self._weights = weights
        self._reach = reach
        self._desk = desk
        self._keep = keep
        self._room = asyncio.Semaphore(max(1, min(AT_ONCE, MEMORY_BYTES // largest_blob(weights))))
        self._orders: asyncio.Queue[FetchValues] = asyncio.Queue()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._open: dict[str, BlobFetch] = {}

    def put(self, order: FetchValues) -> None:
        """Get this; what is still to come from the same node is given up."""
        self._give_up(order.node)
        self._orders.put_nowait(order)

    def forget(self) -> None:
        """Give up everything: the machine that asked for it is no more."""
        while not self._orders.empty():
            self._orders.get_nowait()
        for node in list(self._tasks):
            self._give_up(node)

    def _give_up(self, node: str) -> None:
        if (task := self._tasks.pop(node, None)) is not None:
            task.cancel()
        self._open.pop(node, None)

    def add(self, node: str, chunk: Chunk) -> None:
        """A chunk arrived from a node.

        Raises:
            BadValue: nobody asked for it.
        """
        fetch = self._open.get(node)
        if fetch is None:
            raise BadValue("chunk", f"{chunk.index} of {chunk.blob.hex()} was not asked for")
        fetch.add(chunk)

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                order = await self._orders.get()
                self._give_up(order.node)
                self._tasks[order.node] = tasks.create_task(self._get(order))

    async def _get(self, order: FetchValues) -> None:
        async with self._room:
            try:
                found = await self._collect(order)
            except (NotConnected, WireError) as error:
                say, said = structlog.get_logger().warning, {"node": order.node, "problem": str(error)}
                self._seldom.say(say, "displacement dropped", order.node, type(error).__name__, **said)
                found = None
        self._tasks.pop(order.node, None)
        if found is None:
            self._desk.handle(ValuesMissed(asyncio.get_running_loop().time(), order.node, order.update))
        else:
            self._keep(found)

    async def _collect(self, order: FetchValues) -> KeepValues:
        update, announced = order.update, order.update.values
        assert announced is not None
        if announced.size > largest_blob(self._weights):
            raise BadValue("values", f"{announced.size} bytes are announced for {self._weights} weights")

        def ask(chunks: tuple[int, ...]) -> None:
            want = Want(self._desk.header(), update.boot, blob=announced.blob, chunks=chunks)
            self._desk.reply(order.node, want)

        fetch = BlobFetch(announced.blob, announced.size, ask)
        self._open[order.node] = fetch
        try:
            async with asyncio.timeout(LONGEST_S):
                blob = await fetch.collect(silences=SILENCES)
        except TimeoutError as error:
            raise NotConnected(f"blob {announced.blob.hex()}", f"did not come whole within {LONGEST_S:g} s") from error
        finally:
            if self._open.get(order.node) is fetch:
                del self._open[order.node]
        verdict = await asyncio.to_thread(self._verdict, update, announced.blob, blob)
        return KeepValues(order.node, update, blob, verdict)

    def _verdict(self, update: Update, name: bytes, blob: bytes) -> Verdict:
        steps = update.values.steps if update.values is not None else 1
        return verdict_on(decode_values(blob, name, self._weights), update.loss, self._reach(steps))
