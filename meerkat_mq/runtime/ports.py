"""What a driver needs of its world: a clock, work that takes time, a transport. The ledger's port is `ledger.Store`.

A monitor looks on at a driver, and tells people: nothing that it does changes the run.

A driver is synchronous. It is called with what happens (a message, a connection, the end of some work), and calls its
ports. No port call blocks, and no port calls back before the call into it has returned. So a driver never meets itself
half-way, and whoever binds the ports decides what time is: the event loop's in a service, a virtual one in `worlds/`.

An exception that leaves a callback ends the process: the port that called back hands it on to whoever runs the driver.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.rounds.events import CommitEntry
from meerkat_mq.wire.descriptor import NodeStatus

Result = TypeVar("Result")
Failed = Callable[[Exception], None]


class Timer(Protocol):
    """Something that will be done at a time."""

    def cancel(self) -> None:
        """Do not do it. Does nothing once it is done."""


class Clock(Protocol):
    """Seconds that never go back, from an arbitrary start."""

    def now(self) -> float:
        """The present time."""

    def at(self, time: float, action: Callable[[], None]) -> Timer:
        """Do something at a time, or soon where that is past."""


class Compute(Protocol):
    """A worker. What it is given blocks, and is done in order, one after another."""

    def run(self, job: Callable[[], Result], done: Callable[[Result], None], failed: Failed) -> None:
        """Do a job; `done` takes what it returned, or `failed` what it raised."""


class Transport(Protocol):
    """A session with the broker that outlives connections; delivery is at least once, in order of publication."""

    @property
    def link(self) -> int | None:
        """Random number of the present connection; None while there is none."""

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> object:
        """Send a message, now or on the next connection.

        Raises:
            PayloadTooLarge: the packet would be larger than the broker takes.
            NotConnected: too much waits, and the message is not retained.
        """

    def subscribe(self, topic: str) -> None:
        """Add a filter, on every connection from now on."""

    def unsubscribe(self, topic: str) -> None:
        """Remove a filter."""

    def renew(self) -> None:
        """Make another connection, with the will as it is then."""

    def disown(self) -> None:
        """Another process owns our topics: publish no more, and leave neither will nor farewell."""


class ServerMonitor:
    """Who looks on at a server; this one does nothing."""

    def counted(self, reason: str) -> None:
        """Something noteworthy happened."""

    def heard_from(self, node: str, status: NodeStatus) -> None:
        """A node said what it does."""

    def took_term(self, term: int) -> None:
        """This server is in charge."""

    def stood(self, version: int, theta: Float32Array) -> None:
        """theta, float32 (n,), is committed at a version."""

    def closed(self, commit: CommitEntry, online: int) -> None:
        """A round was committed."""

    def changed(self, online: int, *, is_open: bool, finished: bool) -> None:
        """The machine was told something."""
