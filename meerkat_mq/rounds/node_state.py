"""What a node's machine knows, its phases, and what follows from both; `node.py` says what changes them."""

from dataclasses import dataclass

from meerkat_mq.core import metrics as m
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.policy import lane_of
from meerkat_mq.rounds.transitions import NodePhase
from meerkat_mq.wire.frames import Header, Round, Update

RETRY_S = 2.0


@dataclass(frozen=True, slots=True)
class Done:
    """Finished steps, to be sent until they are acknowledged."""

    task: e.StartSteps | None  # what asked for them; None if an earlier process of this node did the steps
    update: Update  # begun from theta of its header's version

    @property
    def version(self) -> int:
        """The round's."""
        return self.update.header.version


class NodeMachineState:
    """One node process in one run; `slot` is given by the welcome of the present server."""

    def __init__(
        self,
        *,
        run_id: bytes,
        mask_hash: bytes,
        base: bytes,
        boot: int,
        now: float,
        count: int = 2**32 - 1,
        max_staleness: int = 0,
        pending: Update | None = None,
    ) -> None:
        """A node whose theta is theta_0, of digest `base`, 16 bytes.

        Args:
            boot: random u32 of this process.
            count: versions of the run, beyond which nothing is believed.
            max_staleness: how many versions old the theta of an update may be.
            pending: an update of this run that an earlier process kept; its seeds say which lane it is of.
        """
        self._run_id = run_id
        self._mask_hash = mask_hash
        self._boot = boot
        self._theta_0 = base
        self._rank = (0, "")
        self._link: int | None = None
        self._heard_at = now  # something of the newest server
        self._trusted_term = 0
        self._frame: Round | None = None
        self._uninformed = True
        self._two_servers = False
        self._answered = False
        self._last_version = count
        self._max_staleness = max_staleness
        self._done = Done(None, pending) if pending is not None else None
        self._stopping = False
        self._in_vain = 0
        self._sent = pending is not None
        self._acknowledged_version: int | None = None
        self._busy: e.ApplyEntries | e.FetchSnapshot | e.StartSteps | None = None
        self._greet_at = now + RETRY_S
        self._ask_at = self._step_at = float("-inf")
        self._pause_s = RETRY_S
        self._digests_refused = 0
        self._effects: list[e.NodeEffect] = []
        self.slot: int | None = None
        self._stand_at_theta_0()

    def _stand_at_theta_0(self) -> None:
        self.version = 0
        self._head = self._mask_hash
        self._base = self._theta_0

    @property
    def phase(self) -> NodePhase:
        """Where the machine stands; `TRANSITIONS` says what leads where."""
        match self._busy:
            case e.ApplyEntries():
                return NodePhase.APPLYING
            case e.FetchSnapshot():
                return NodePhase.LOADING
            case e.StartSteps():
                return NodePhase.STEPPING
        if self._behind:
            return NodePhase.BEHIND
        return NodePhase.IDLE if self._done is None else NodePhase.SENDING

    @property
    def term(self) -> int:
        """The highest that it has seen."""
        return self._rank[0]

    @property
    def wake_at(self) -> float | None:
        """When the machine wants its next Tick; None: not before another event."""
        times = [self._greet_at] if self._unknown else []
        if self._two_servers or self._lacks_entries:
            times.append(self._ask_at)
        if self._due is not None:
            times.append(self._step_at)
        return min(times, default=None)

    @property
    def _unknown(self) -> bool:
        """Whether, on this connection, server and node may not know of each other."""
        return self.slot is None or self._uninformed

    @property
    def _behind(self) -> bool:
        return self._frame is not None and self._frame.header.version > self.version

    @property
    def _lacks_entries(self) -> bool:
        return self._behind and self._busy is None

    def _count(self, reason: m.Metric, about: int | None = None) -> None:
        """Count `reason` for the round `about`; by default the round of this node's version."""
        self._effects.append(e.Count(reason, round=self.version if about is None else about))

    @property
    def _due(self) -> e.StartSteps | None:
        """The steps that the round asks of this node, unless they are done, or something else has to be done first."""
        task = self._task() if self._busy is None and not self._behind else None
        return None if task is None or self._has_done(task) else task

    def _has_done(self, task: e.StartSteps) -> bool:
        done = self._done
        return done is not None and done.version == task.version and done.task in (None, task)

    @property
    def _oldest(self) -> int:
        return max(1, self._max_staleness)

    def _age(self, version: int) -> int:
        """How many versions the head is ahead."""
        return self._frame.header.version - version if self._frame is not None else 0

    def _still_asked(self, done: Done, frame: Round, slot: int) -> bool:
        """Whether the server can use finished steps: not those of a slot in another lane."""
        if done.task is None or done.version != frame.header.version:
            same_lane = done.task is None or done.task.lane == lane_of(slot, frame.lanes)
            return same_lane and done.version <= frame.header.version
        return done.task == self._task()

    def _acknowledged(self, version: int, frame: Round) -> bool:
        """Whether the server has committed this node's update from theta of `version`."""
        if self.slot in frame.heard:
            return version <= frame.header.version
        age = dict(frame.heard_before).get(self.slot) if self.slot is not None else None
        return age is not None and version <= frame.header.version - age

    def _task(self) -> e.StartSteps | None:
        frame = self._frame
        if frame is None or not frame.is_open or frame.header.version != self.version:
            return None
        if self.slot is None or self.slot not in frame.asked or self.slot in frame.heard:
            return None
        if self._acknowledged_version == self.version:
            return None
        steps = dict(frame.short).get(self.slot, frame.steps)
        return e.StartSteps(self.version, lane_of(self.slot, frame.lanes), steps, frame.eps)

    def _header(self) -> Header:
        return Header.of(self._run_id, self._rank[0], self.version, self._mask_hash)
