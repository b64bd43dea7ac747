"""What every node's model does with what the server has decided: entries, snapshots, its own displacements."""

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.path import Entry, check_steps, digest
from meerkat_mq.core.replica import Change, Replica
from meerkat_mq.core.values import Residual
from meerkat_mq.errors import BadValue
from meerkat_mq.runtime.model import Place
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.messages import Offer
from meerkat_mq.wire.snapshot import decode_snapshot


class Follower:
    """The part of `runtime.model.Model` that needs neither a model nor data.

    Args:
        run: what is followed.
        replica: theta, at theta_0.
        residual: of a values node: what its codec lost so far.
    """

    def __init__(self, run: RunDescriptor, replica: Replica, residual: Residual | None = None) -> None:
        self._run = run
        self._replica = replica
        self._residual = residual

    @property
    def place(self) -> Place:
        """Where `go_to` leads back to."""
        return self._replica.theta, self._replica.version

    def go_to(self, place: Place) -> None:
        """Have theta be what it was."""
        self._replica.load(*place)

    def apply(self, entries: tuple[Entry, ...], displacement: Float32Array | None) -> tuple[bytes, ...]:
        """Apply entries to theta, the last one with what its displacement decodes to, float32 (n,).

        Returns:
            The digests, zeros where none is due.

        Raises:
            BadValue: a step of an entry is longer than any of this run can be.
            NotFinite: theta would not be finite.
        """
        if self._run.max_step is not None:
            for entry in entries:
                check_steps(entry, self._run.max_step)
        changes: list[Change] = [(entry.terms, None) for entry in entries[:-1]]
        return self._replica.replay([*changes, (entries[-1].terms, displacement)])

    def load(self, blob: bytes, offer: Offer) -> tuple[bytes, bytes]:
        """Go to a snapshot's theta; returns the hash of the last entry before it, and theta's digest.

        Raises:
            WireError: it is damaged or not what was offered; theta is as it was.
        """
        snapshot = decode_snapshot(blob, offer.blob, self._run.weights)
        if (snapshot.run_id, snapshot.version) != (self._run.run_id, offer.version):
            raise BadValue("snapshot", f"is of run {snapshot.run_id.hex()}, version {snapshot.version}")
        self._replica.load(snapshot.theta, snapshot.version)
        return snapshot.head, digest(snapshot.theta)

    def reset(self) -> None:
        """Back to theta_0."""
        self._replica.reset()

    def forget(self, version: int, heard: bool) -> None:
        """The update from theta of `version` is acknowledged, or came too late."""
        if self._residual is not None:
            self._residual.forget(version, heard=heard)
