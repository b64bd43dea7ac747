"""When a duty-cycled node may sleep: what is left to do, and what of it can wait (docs/duty-cycle.md)."""

from meerkat_mq.rounds.node import NodeMachine
from meerkat_mq.runtime.jobs import Jobs, NodeJob
from meerkat_mq.wire.messages import Round

GRACE_S = 2.0  # an idle node waits this long for a request of the round before it sleeps


def is_behind(frame: Round | None, machine: NodeMachine) -> bool:
    """Whether the newest round is of a later version than a node's."""
    return frame is not None and frame.header.version > machine.version


class Rest:
    """What is known since the node woke.

    Attributes:
        nothing_left: the node's last update was acknowledged, or its run is finished.
    """

    def __init__(self) -> None:
        self.nothing_left = False
        self._idle_since: float | None = None
        self._last_job: NodeJob | None = None

    def may_sleep(self, late: bool, jobs: Jobs, frame: Round | None, machine: NodeMachine, now: float) -> bool:
        """Whether the node has nothing left to do; or, if it is late, nothing that sleep must not interrupt.

        Args:
            late: its time to be awake (`schedule.awake_s`) is over.
            jobs: of its run.
            frame: the newest round.
            machine: of its run.
            now: the present time.
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
