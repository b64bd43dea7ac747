"""Who looks on at a driver, and tells people: nothing that a monitor does changes the run."""

from typing import Protocol

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask
from meerkat_mq.rounds.events import EntryCommitted
from meerkat_mq.rounds.server import ServerMachine
from meerkat_mq.runtime.model import Model
from meerkat_mq.wire.descriptor import NodeStatus, RunDescriptor


class ServerMonitor(Protocol):
    """Who looks on at a server."""

    def counted(self, reason: str) -> None:
        """Something noteworthy happened."""

    def heard_from(self, node: str, status: NodeStatus) -> None:
        """A node said what it does."""

    def took_term(self, term: int, machine: ServerMachine) -> None:
        """This server is in charge."""

    def stood(self, version: int, theta: Float32Array) -> None:
        """theta, float32 (n,), is committed at a version."""

    def opened(self) -> None:
        """A round is open."""

    def closed(self, event: EntryCommitted, online: int) -> None:
        """A round was committed."""

    def changed(self, online: int, *, is_open: bool, finished: bool) -> None:
        """The machine was told something."""


class NodeMonitor(Protocol):
    """Who looks on at a node."""

    def ready(self, run: RunDescriptor, mask: Mask, model: Model) -> None:
        """The node has a run's mask and model."""

    def changed(self) -> None:
        """Something was received or done: the node may have nothing more to do."""

    def finished(self, version: int, theta: bytes) -> None:
        """The node has all entries of its run; with the digest of theta."""
