"""What a node's machine asks for that takes time: done one after another, off the event loop."""

import asyncio
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar, TypeVarTuple

import structlog

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.path import Displacement, Entry, seeds_of
from meerkat_mq.core.seldom import Seldom
from meerkat_mq.errors import BadValue, NotConnected, NotFinite, WireError, reason
from meerkat_mq.node.blobs import Blobs
from meerkat_mq.node.limits import Allowance
from meerkat_mq.node.state import KeptUpdate, NodeState
from meerkat_mq.node.work import Work
from meerkat_mq.rounds import events as e
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.messages import Offer, Update
from meerkat_mq.wire.values import decode_values, largest_blob

Args = TypeVarTuple("Args")
Result = TypeVar("Result")
Job = e.ApplyEntries | e.FetchSnapshot | e.ResetTheta | e.StartSteps | e.Forget | Update

SILENCES = 4  # of a server whose entries name a blob, or that offered one


async def in_worker(worker: ThreadPoolExecutor, function: Callable[[*Args], Result], *args: *Args) -> Result:
    """Run a blocking function in the thread of the model."""
    return await asyncio.get_running_loop().run_in_executor(worker, function, *args)


class Jobs:
    """The jobs of one run.

    Args:
        run: the run.
        work: does them; used in `worker` only.
        blobs: brings what they need.
        state: keeps the update until it is heard.
        keeps: whether an update is kept on disk: where it may be wanted long after it was made.
        kept: what an earlier process kept.
        allowance: whether local steps may begin.
        worker: the thread of the model.
        tell: takes the answer to each job that is done, None to one without.
        send: sends an update to the server.
    """

    def __init__(
        self,
        run: RunDescriptor,
        work: Work,
        blobs: Blobs,
        state: NodeState,
        *,
        keeps: bool,
        kept: KeptUpdate | None,
        allowance: Allowance,
        worker: ThreadPoolExecutor,
        tell: Callable[[e.NodeEvent | None], None],
        send: Callable[[Update], None],
    ) -> None:
        self._seldom = Seldom()
        self._run = run
        self._work = work
        self._blobs = blobs
        self._state = state
        self._keeps = keeps
        self._kept = kept
        self._allowance = allowance
        self._worker = worker
        self._tell = tell
        self._send = send
        self._blob = b""  # of the newest displacement
        self._lane = 0  # of the newest path
        self._open: deque[Job] = deque()  # the first one is being done
        self._news = asyncio.Event()
        self._stop = threading.Event()
        self._moved_on = asyncio.Event()
        blobs.give(kept)

    @property
    def busy(self) -> bool:
        """Whether a job is being done, or waits."""
        return bool(self._open)

    @property
    def catching_up(self) -> Job | None:
        """The job that fetches or applies what the server has decided, if one is being done, or waits."""
        return next((job for job in self._open if isinstance(job, e.ApplyEntries | e.FetchSnapshot)), None)

    def put(self, job: Job) -> None:
        """Do this after what waits already."""
        if isinstance(job, e.StartSteps):
            self._stop, self._moved_on = threading.Event(), asyncio.Event()
        if isinstance(job, Update) and not self._wants_keeping(job):
            self._send(job)
            return
        self._open.append(job)
        self._news.set()

    def stop_steps(self) -> None:
        """End the local steps after the one that is being made."""
        self._stop.set()
        self.move_on()

    def move_on(self) -> None:
        """The run is ahead of this node: local steps that wait for the allowance wait no longer."""
        self._moved_on.set()

    async def run(self) -> None:
        """Do the jobs as they come, until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._open:
                answer = await self._do(self._open[0])
                self._open.popleft()
                self._tell(answer)

    async def _do(self, job: Job) -> e.NodeEvent | None:
        match job:
            case e.ApplyEntries(entries):
                return await self._apply(entries)
            case e.FetchSnapshot(offer):
                return await self._load_snapshot(offer)
            case e.ResetTheta():
                await in_worker(self._worker, self._work.reset)
            case e.StartSteps():
                return await self._step(job)
            case e.Forget():
                await self._forget(job)
            case Update():
                await self._keep(job)
                self._send(job)
        return None

    # --- following the ledger ---

    async def _apply(self, entries: tuple[Entry, ...]) -> e.EntriesApplied | e.EntriesMissed:
        """Apply entries, one displacement in memory at a time; all of them, or none."""
        before, digests = self._work.standing, list[bytes]()
        try:
            for part in _parts(entries):
                values = await self._values(part[-1].displacement)
                digests += await in_worker(self._worker, self._work.apply, part, values)
        except (NotConnected, NotFinite, WireError) as error:
            await in_worker(self._worker, self._work.stand, before)
            said = {"first": entries[0].version, "problem": str(error)}
            self._seldom.say(structlog.get_logger().warning, "entries missed", type(error).__name__, **said)
            return e.EntriesMissed(_now(), entries)
        self._work.digest = next((found for found in reversed(digests) if any(found)), self._work.digest)
        return e.EntriesApplied(_now(), entries, tuple(digests))

    async def _values(self, displacement: Displacement | None) -> Float32Array | None:
        """Get a displacement, which may be on its way to everybody, or there already.

        Raises:
            NotConnected: it did not come.
            WireError: it is none.
        """
        if displacement is None:
            return None
        weights = self._run.weights
        if displacement.size > largest_blob(weights):
            raise BadValue("displacement", f"{displacement.size} bytes for {weights} weights")
        blob = await self._collect(displacement.blob, displacement.size)
        return await in_worker(self._worker, decode_values, blob, displacement.blob, weights)

    async def _collect(self, name: bytes, size: int) -> bytes:
        unasked = self._blobs.comes_unasked(name)
        try:
            return await self._blobs.begin(name, size).collect(unasked=unasked, silences=SILENCES)
        finally:
            self._blobs.end()

    async def _load_snapshot(self, offer: Offer) -> e.SnapshotLoaded | e.SnapshotMissed:
        work, log = self._work, structlog.get_logger()
        try:
            work.check_offer(offer)
            blob = await self._collect(offer.blob, offer.size)
            head, work.digest = await in_worker(self._worker, work.load, blob, offer)
        except (NotConnected, WireError) as error:
            said = {"version": offer.version, "problem": str(error)}
            self._seldom.say(log.warning, "snapshot missed", type(error).__name__, **said)
            return e.SnapshotMissed(_now(), offer.version)
        log.info("snapshot loaded", version=offer.version, bytes=offer.size)
        return e.SnapshotLoaded(_now(), offer.version, head, work.digest)

    # --- steps, and what comes of them ---

    async def _step(self, order: e.StartSteps) -> e.StepsDone | e.StepsFailed:
        stop = self._stop
        result = None
        if await self._allowance.given(self._moved_on) and not stop.is_set():
            try:
                result = await in_worker(self._worker, self._work.step, order, stop)
            except Exception as error:  # an engine raises what its library does: CUDA out of memory, for one
                say, said = structlog.get_logger().warning, {"round": order.version, "problem": reason(error)}
                self._seldom.say(say, "steps failed", type(error).__name__, **said)
                return e.StepsFailed(_now(), order.version)
        if result is None:  # an earlier update may still be unsent: its blob and lane stay
            return e.StepsDone(_now(), order.version, (), math.nan)
        self._blob, self._lane = result.blob, order.lane
        return e.StepsDone(_now(), order.version, result.scalars, result.loss, result.values)

    def _wants_keeping(self, update: Update) -> bool:
        return (self._keeps or update.values is not None) and not self._is_kept(update)

    def _is_kept(self, update: Update) -> bool:
        kept = self._kept
        return kept is not None and (kept.update.boot, kept.update.header.version) == (
            update.boot,
            update.header.version,
        )

    async def _keep(self, update: Update) -> None:
        """Keep an update and its displacement until it is heard."""
        if self._is_kept(update):
            return
        if update.values is None:  # by its seeds the server tells, after a restart, which lane this path walked
            seeds = seeds_of(self._run.run_id, update.header.version, self._lane, len(update.scalars))
            update = replace(update, seeds=seeds)
        kept = KeptUpdate(update, self._blob if update.values is not None else b"")
        if self._keeps:
            await asyncio.to_thread(self._state.keep_update, self._run, kept)
        self._kept, self._blob = kept, b""
        self._blobs.give(kept)

    async def _forget(self, order: e.Forget) -> None:
        await in_worker(self._worker, self._work.forget, order.version, order.heard)
        if self._kept is not None and self._kept.update.header.version == order.version:
            self._kept = None
            self._blobs.give(None)
            await asyncio.to_thread(self._state.forget_update)


def _parts(entries: tuple[Entry, ...]) -> Iterator[tuple[Entry, ...]]:
    """Cut after each entry with a displacement."""
    first = 0
    for number, entry in enumerate(entries, start=1):
        if entry.displacement is not None or number == len(entries):
            yield entries[first:number]
            first = number


def _now() -> float:
    return asyncio.get_running_loop().time()
