"""What a node's machine asks for that takes time, in one run: done one after another, by the node's worker."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import assert_never

import structlog

from meerkat_mq.core.path import Displacement, Entry, seeds_of
from meerkat_mq.core.seldom import Seldom
from meerkat_mq.errors import BadValue, NotConnected, NotFinite, PolicyRefused, WireError, reason
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.node import NodeMachine
from meerkat_mq.runtime.blobs import Blobs
from meerkat_mq.runtime.model import KeptUpdate, Model, NodeStore, StepCompute, StepResult
from meerkat_mq.runtime.policy import NodePolicy
from meerkat_mq.runtime.ports import Clock, Failed
from meerkat_mq.runtime.steps import Done, Sequence, Steps, until, work
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.messages import Offer, Round, Update
from meerkat_mq.wire.snapshot import largest_snapshot
from meerkat_mq.wire.values import largest_blob

NodeJob = e.ApplyEntries | e.FetchSnapshot | e.ResetTheta | e.StartSteps | e.Forget | Update

GRACE_S = 2.0  # an idle node waits this long for a request of the round before it sleeps
SILENCES = 4  # of a server whose entries name a blob, or that offered one


class Jobs:
    """The jobs of one run.

    Args:
        keeps: whether an update is kept on disk: where it may be wanted long after it was made.
        kept: what an earlier process kept.
        theta_0: its digest.
        tell: takes the answer to each job that is done, None to one without.
        send: sends an update to the server.
        policy: of the node; `refused` is told what it does not allow.
        failed: is told what a job raised that no job may: then none is done any more.
    """

    def __init__(
        self,
        run: RunDescriptor,
        model: Model,
        blobs: Blobs,
        store: NodeStore,
        *,
        keeps: bool,
        kept: KeptUpdate | None,
        compute: StepCompute,
        clock: Clock,
        theta_0: bytes,
        tell: Callable[[e.NodeEvent | None], None],
        send: Callable[[Update], None],
        policy: NodePolicy,
        refused: Callable[[PolicyRefused], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._digest = self._theta_0 = theta_0
        self._seldom = Seldom()
        self._run = run
        self._model = model
        self._blobs = blobs
        self._store = store
        self._keeps = keeps
        self._kept = kept
        self._compute = compute
        self._clock = clock
        self._tell = tell
        self._send = send
        self._policy = policy
        self._refused = refused
        self._failed = failed
        self._blob = b""  # of the newest displacement
        self._lane = 0  # of the newest path
        self._open: deque[NodeJob] = deque()  # the first one is being done
        self._working: Sequence[Exception | None] | None = None
        self._is_working = False
        self._stopped: NodeJob | None = None  # before it began
        self._moved_on: NodeJob | None = None
        blobs.give(kept)

    @property
    def busy(self) -> bool:
        """Whether a job is being done, or waits."""
        return bool(self._open)

    @property
    def catching_up(self) -> NodeJob | None:
        """The job that fetches or applies what the server has decided, if one is being done, or waits."""
        return next((job for job in self._open if isinstance(job, e.ApplyEntries | e.FetchSnapshot)), None)

    def digest_at(self, version: int) -> bytes:
        """The digest of the newest theta at or before the machine's version whose digest is due.

        A machine that goes back to theta_0 says so before it has put the job that does.
        """
        return self._digest if version else self._theta_0

    def put(self, job: NodeJob) -> None:
        """Do this after what waits already."""
        if isinstance(job, e.ResetTheta):
            self._digest = self._theta_0
        if isinstance(job, Update) and not self._wants_keeping(job):
            self._send(job)
            return
        self._open.append(job)
        if not self._is_working:
            self._is_working = True
            self._working = Sequence(self._work_off(), self._ended)

    def stop_steps(self) -> None:
        """End the local steps after the one that is being made; those that wait are not begun."""
        self._stopped = self._steps
        self._compute.stop_steps()

    def move_on(self) -> None:
        """The run is ahead of this node: local steps that wait until they may begin wait no longer."""
        self._moved_on = self._steps
        self._compute.move_on()

    @property
    def _steps(self) -> NodeJob | None:
        """The local steps that are being made, or wait."""
        return next((job for job in self._open if isinstance(job, e.StartSteps)), None)

    def close(self) -> None:
        """The run is over for this node: do no more."""
        self.stop_steps()
        self._open.clear()
        if self._working is not None:
            self._working.cancel()
        self._blobs.end()

    def _work_off(self) -> Steps[Exception | None]:
        yield from until(self._clock, self._clock.now())  # whoever puts a job has something else to do first
        while self._open:
            try:
                answer = yield from self._do(self._open[0])
            except Exception as error:  # of the model, the disk or the worker
                return error
            self._open.popleft()
            self._tell(answer)  # may put more, or close
        self._is_working = False
        return None

    def _ended(self, error: Exception | None) -> None:
        if error is not None:
            self._failed(error)

    def _do(self, job: NodeJob) -> Steps[e.NodeEvent | None]:
        match job:
            case e.ApplyEntries(entries):
                return (yield from self._apply(entries))
            case e.FetchSnapshot(offer):
                return (yield from self._load_snapshot(offer))
            case e.ResetTheta():
                yield from work(self._compute, self._model.reset)
            case e.StartSteps():
                return (yield from self._step(job))
            case e.Forget():
                yield from self._forget(job)
            case Update():
                yield from self._keep(job)
                self._send(job)
            case _:
                assert_never(job)
        return None

    # --- following the ledger ---

    def _apply(self, entries: tuple[Entry, ...]) -> Steps[e.EntriesApplied | e.JobFailed]:
        """Apply entries, one displacement in memory at a time; all of them, or none."""
        before, digests = self._model.place, list[bytes]()
        try:
            for part in _parts(entries):
                blob = yield from self._displacement(part[-1].displacement)
                digests += yield from work(self._compute, self._model.apply, part, blob)
        except (NotConnected, NotFinite, WireError) as error:
            yield from work(self._compute, self._model.go_to, before)
            said = {"first": entries[0].version, "problem": str(error)}
            self._seldom.say(structlog.get_logger().warning, "entries missed", type(error).__name__, **said)
            return e.JobFailed(self._clock.now(), e.ApplyEntries(entries))
        self._digest = next((found for found in reversed(digests) if any(found)), self._digest)
        return e.EntriesApplied(self._clock.now(), entries, tuple(digests))

    def _displacement(self, displacement: Displacement | None) -> Steps[bytes]:
        """Get a displacement, on its way to all or there already; b"" for none. NotConnected, BadValue: it is not."""
        if displacement is None:
            return b""
        weights = self._run.weights
        if displacement.size > largest_blob(weights):
            raise BadValue("displacement", f"{displacement.size} bytes for {weights} weights")
        return (yield from self._collect(displacement.blob, displacement.size))

    def _collect(self, name: bytes, size: int) -> Steps[bytes]:
        """Get a blob. NotConnected: it does not come; SpentToday: the node may fetch no more today."""
        yield from work(self._compute, self._policy.count_fetch, size, self._store)
        unasked = self._blobs.comes_unasked(name)
        try:
            return (yield from self._blobs.begin(name, size).collect(unasked=unasked, silences=SILENCES))
        finally:
            self._blobs.end()

    def _load_snapshot(self, offer: Offer) -> Steps[e.SnapshotLoaded | e.JobFailed]:
        log = structlog.get_logger()
        try:
            if offer.size > largest_snapshot(self._run.weights):
                raise BadValue("offer", f"{offer.size} bytes for {self._run.weights} weights")
            blob = yield from self._collect(offer.blob, offer.size)
            head, self._digest = yield from work(self._compute, self._model.load, blob, offer)
        except (NotConnected, WireError) as error:
            said = {"version": offer.version, "problem": str(error)}
            self._seldom.say(log.warning, "snapshot missed", type(error).__name__, **said)
            return e.JobFailed(self._clock.now(), e.FetchSnapshot(offer))
        log.info("snapshot loaded", version=offer.version, bytes=offer.size)
        return e.SnapshotLoaded(self._clock.now(), offer.version, head, self._digest)

    # --- steps, and what comes of them ---

    def _step(self, order: e.StartSteps) -> Steps[e.StepsDone | e.JobFailed]:
        result: StepResult | None = None
        try:
            if order is not self._stopped:
                yield from self._policy.admit(self._run, self._model, order, self._store, self._compute)
            if order is not self._stopped:
                result = yield partial(self._begin_steps, order)
        except PolicyRefused as error:
            self._refused(error)
            return e.JobFailed(self._clock.now(), order)
        except Exception as error:  # an engine raises what its library does: CUDA out of memory, for one
            say, said = structlog.get_logger().warning, {"round": order.version, "problem": reason(error)}
            self._seldom.say(say, "steps failed", type(error).__name__, **said)
            return e.JobFailed(self._clock.now(), order)
        if result is None:  # an earlier update may still be unsent: its blob and lane stay
            return e.StepsDone(self._clock.now(), order.version, (), math.nan)
        self._blob, self._lane = result.blob, order.lane
        return e.StepsDone(self._clock.now(), order.version, result.scalars, result.loss, result.values)

    def _begin_steps(self, order: e.StartSteps, done: Done, failed: Failed) -> None:
        self._compute.steps(self._model, order, done, failed)
        if order is self._moved_on:  # while it waited for other jobs
            self._compute.move_on()

    def _wants_keeping(self, update: Update) -> bool:
        return (self._keeps or update.values is not None) and not self._is_kept(update)

    def _is_kept(self, update: Update) -> bool:
        kept = self._kept
        return kept is not None and (kept.update.boot, kept.update.header.version) == (
            update.boot,
            update.header.version,
        )

    def _keep(self, update: Update) -> Steps[None]:
        """Keep an update and its displacement until it is acknowledged."""
        if self._is_kept(update):
            return
        if update.values is None:  # by its seeds the server tells, after a restart, which lane this path walked
            seeds = seeds_of(self._run.run_id, update.header.version, self._lane, len(update.scalars))
            update = replace(update, seeds=seeds)
        kept = KeptUpdate(update, self._blob if update.values is not None else b"")
        if self._keeps:
            yield from work(self._compute, self._store.keep_update, self._run, kept)
        self._kept, self._blob = kept, b""
        self._blobs.give(kept)

    def _forget(self, order: e.Forget) -> Steps[None]:
        is_kept = self._kept is not None and self._kept.update.header.version == order.version
        if is_kept:
            self._kept = None
            self._blobs.give(None)
        yield from work(self._compute, self._settle, order, is_kept)

    def _settle(self, order: e.Forget, is_kept: bool) -> None:
        self._model.forget(order.version, order.heard)
        if is_kept:
            self._store.forget_update()


def _parts(entries: tuple[Entry, ...]) -> Iterator[tuple[Entry, ...]]:
    """Cut after each entry with a displacement."""
    first = 0
    for number, entry in enumerate(entries, start=1):
        if entry.displacement is not None or number == len(entries):
            yield entries[first:number]
            first = number


def is_behind(frame: Round | None, machine: NodeMachine) -> bool:
    """Whether the newest round is of a later version than a node's."""
    return frame is not None and frame.header.version > machine.version


class Rest:
    """When a duty-cycled node may sleep: what is known since it woke (docs/duty-cycle.md).

    Attributes:
        nothing_left: the node's last update was acknowledged, or its run is finished.
    """

    def __init__(self) -> None:
        self.nothing_left = False
        self._idle_since: float | None = None
        self._last_job: NodeJob | None = None

    def may_sleep(self, late: bool, jobs: Jobs, frame: Round | None, machine: NodeMachine, now: float) -> bool:
        """Whether the node has nothing left to do; or, if it is late, nothing that sleep must not interrupt.

        It is late once its time to be awake (`schedule.awake_s`) is over. `frame` is the newest round.
        """
        if not late:
            idle = self._is_idle(jobs, frame, machine, now)
            return idle or (self.nothing_left and not jobs.busy and not is_behind(frame, machine))
        job = jobs.catching_up
        self._last_job = self._last_job or job  # only this one: catching up with every later one would never end
        return job is None or job is not self._last_job

    def _is_idle(self, jobs: Jobs, frame: Round | None, machine: NodeMachine, now: float) -> bool:
        """Whether, for a while, the node has been up to date, and the newest round has not asked anything of it."""
        if jobs.busy or frame is None or machine.slot is None:
            self._idle_since = None
        else:
            asked = frame.is_open and machine.slot in frame.asked - frame.heard
            since = now if self._idle_since is None else self._idle_since
            self._idle_since = None if asked or frame.header.version != machine.version else since
        return self._idle_since is not None and now >= self._idle_since + GRACE_S
