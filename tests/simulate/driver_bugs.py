"""Bugs to plant in drivers, and those that only faults which never heal bring to light."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from meerkat_mq.core.path import digest, short_hash
from meerkat_mq.errors import WireError
from meerkat_mq.ledger.snapshots import Snapshots
from meerkat_mq.rounds import server
from meerkat_mq.rounds.events import ApplyEntries, SendEntries, StatusCame
from meerkat_mq.rounds.roster import Awaited
from meerkat_mq.rounds.server import ServerMachine
from meerkat_mq.runtime import writer
from meerkat_mq.runtime.jobs import Jobs
from meerkat_mq.runtime.node import NodeDriver
from meerkat_mq.runtime.server import ServerDriver
from meerkat_mq.runtime.steps import until
from meerkat_mq.runtime.writer import LedgerWriter
from meerkat_mq.simulate.node import MadeUpModel
from meerkat_mq.wire.descriptor import NodeStatus
from meerkat_mq.wire.messages import Offer, Update
from meerkat_mq.wire.snapshot import Snapshot, decode_snapshot
from meerkat_mq.worlds.store import MemoryStore

Machine = Any  # its private methods are what is broken here


def answer_twice(patch: pytest.MonkeyPatch) -> None:
    """What has worked is done once more, and answered once more."""
    patiently = LedgerWriter._patiently

    def broken(self: Machine, *work: Any) -> Any:
        yield from patiently(self, *work)
        return (yield from patiently(self, *work))

    patch.setattr(LedgerWriter, "_patiently", broken)


def forget_an_effect(patch: pytest.MonkeyPatch) -> None:
    """Nobody is given the entries that it asks for."""
    carry_out = ServerDriver._carry_out
    patch.setattr(
        ServerDriver,
        "_carry_out",
        lambda self, effect: None if isinstance(effect, SendEntries) else carry_out(self, effect),
    )


def apply_again_after_a_reconnect(patch: pytest.MonkeyPatch) -> None:
    """The entries of the newest round are applied once more on each connection."""
    connected = NodeDriver.connected

    def broken(self: Machine, link: int) -> None:
        connected(self, link)
        if self._jobs is not None and self._round is not None and self._round.entries:
            self._jobs.put(ApplyEntries(self._round.entries))

    patch.setattr(NodeDriver, "connected", broken)


def lose_what_came_before_the_connection(patch: pytest.MonkeyPatch) -> None:
    """What is retained counts only once the connection is announced, and the server does not tell it again."""
    received = NodeDriver.received

    def broken(self: Machine, topic: str, payload: bytes, *, retained: bool) -> None:
        if not retained or topic == self._own_status or self.presence._link is not None:
            received(self, topic, payload, retained=retained)

    def on_status(self: Machine, node: str, status: NodeStatus) -> None:
        self._statuses[node] = status
        self.handle(StatusCame(self._clock.now(), node, status))

    patch.setattr(NodeDriver, "received", broken)
    patch.setattr(ServerDriver, "_on_status", on_status)


def go_on_with_the_work_of_an_earlier_term(patch: pytest.MonkeyPatch) -> None:
    """What a machine asked for is done, though its term is over."""
    took_term = ServerDriver.took_term

    def broken(self: Machine, term: int, machine: ServerMachine) -> None:
        self.machine = self.machine or machine
        took_term(self, term, self.machine)

    patch.setattr(ServerDriver, "took_term", broken)


def say_what_is_not_applied_yet(patch: pytest.MonkeyPatch) -> None:
    """A status holds the machine's version, and whatever digest the worker is at."""
    patch.setattr(Jobs, "digest_at", lambda self, version: self._digest)


def drop_a_too_large_reply(patch: pytest.MonkeyPatch) -> None:
    """A node that was away is sent all that it lacks in one reply; what the broker does not take is gone."""
    patch.setattr(writer, "reply_room", lambda frame_bytes: 2**20)
    patch.setattr(Snapshots, "offer", lambda self, header, first: None)


def offer_a_corrupt_snapshot(patch: pytest.MonkeyPatch) -> None:
    """A snapshot is believed to be whole."""
    patch.setattr(MemoryStore, "has_whole", lambda self, kept: self.snapshot(kept) is not None)


def follow_a_corrupt_snapshot(patch: pytest.MonkeyPatch) -> None:
    """A node takes what comes for the snapshot that it was offered; what it cannot read of it reads as zeros."""

    def load(self: Machine, blob: bytes, offer: Offer) -> tuple[bytes, bytes]:
        weights = self._run.weights
        try:
            found = decode_snapshot(blob, short_hash(blob), weights)
        except WireError:
            found = Snapshot(b"", offer.version, blob[28:44].ljust(16, b"\0"), np.zeros(weights, np.float32))
        self._replica.load(found.theta, offer.version)
        return found.head, digest(found.theta)

    patch.setattr(MadeUpModel, "load", load)


# --- that only faults which never heal bring to light ----------------------------------------------------------------


def wait_for_the_dead(patch: pytest.MonkeyPatch) -> None:
    """A round waits for everybody whom it asks, dead or not, and has no deadline."""
    patch.setattr(server, "deadline_length", lambda *of: 1e6)
    patch.setattr(Awaited, "until", lambda self, name, dead_at: None)


def wait_for_who_is_online(patch: pytest.MonkeyPatch) -> None:
    """The deadline of a round does not pass as long as somebody is online who has not answered."""
    close_if_due = ServerMachine._close_if_due

    def broken(self: Machine, now: float) -> None:
        current = self._open
        if current is not None and any(self._nodes[name].online for name in current.awaited._dead_at):
            current.deadline_at = max(current.deadline_at, now + 1.0)
        close_if_due(self, now)

    patch.setattr(ServerMachine, "_close_if_due", broken)


def wait_for_the_disk(patch: pytest.MonkeyPatch) -> None:
    """A node sends no update that its disk has not kept, and stays online."""
    keep = Jobs._keep

    def broken(self: Machine, update: Update) -> Iterator[Any]:
        while self._store.is_full:
            yield from until(self._clock, self._clock.now() + 1.0)
        yield from keep(self, update)

    patch.setattr(Jobs, "_keep", broken)


# Each with the faults that bring it to light.
DRIVER_BUGS: dict[Callable[[pytest.MonkeyPatch], None], tuple[str, ...]] = {
    answer_twice: (),
    forget_an_effect: ("partition", "leave"),
    apply_again_after_a_reconnect: ("partition",),
    lose_what_came_before_the_connection: ("leave", "crash"),
    go_on_with_the_work_of_an_earlier_term: ("hostile",),
    say_what_is_not_applied_yet: ("restore",),
    drop_a_too_large_reply: ("broker crash", "leave"),
    offer_a_corrupt_snapshot: ("damaged snapshots", "leave"),
    follow_a_corrupt_snapshot: ("forged chunks", "leave"),
}
# Each with the faults that bring it to light, where these never heal.
LASTING: dict[Callable[[pytest.MonkeyPatch], None], tuple[str, ...]] = {
    wait_for_the_dead: ("crash",),
    wait_for_who_is_online: ("partition up", "partition down"),
    wait_for_the_disk: ("disk full",),
}
