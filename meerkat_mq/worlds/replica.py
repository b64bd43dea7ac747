"""theta of many processes in one: what one of them has computed, the others take."""

from collections import OrderedDict
from collections.abc import Iterable

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.path import Coefficient, digest, pack_terms, short_hash
from meerkat_mq.core.replica import Change, Replica
from meerkat_mq.ledger.run import Run

_Key = tuple[bytes, int, tuple[Coefficient, ...], bytes | None]


class Thetas:
    """What entries lead to, of one run; the newest `kept` of them.

    Args:
        run: the run.
        kept: how many to remember.

    Attributes:
        after: theta, its name here, and the digest that the entry has.
    """

    def __init__(self, run: Run, kept: int) -> None:
        self.run = run
        self.kept = kept
        self.after: OrderedDict[_Key, tuple[Float32Array, bytes, bytes]] = OrderedDict()
        self.theta_0 = run.mask.theta_0
        self.start = digest(self.theta_0)

    def replica(self) -> "SharedReplica":
        """One at theta_0."""
        return SharedReplica(self)


class SharedReplica(Replica):
    """A replica that computes no entry that another one has just computed from the same theta."""

    def __init__(self, thetas: Thetas) -> None:
        run = thetas.run.descriptor
        super().__init__(thetas.run.mask, run_id=run.run_id, stream=run.stream, digest_every=run.digest_every)
        self._thetas = thetas
        self.reset()

    def reset(self) -> None:
        """Back to theta_0."""
        super().load(self._thetas.theta_0, 0)
        self._name: bytes | None = self._thetas.start

    def load(self, theta: Float32Array, version: int) -> None:
        """Go to a version."""
        super().load(theta, version)
        self._name = None

    def replay(self, changes: Iterable[Change]) -> tuple[bytes, ...]:
        """Apply entries, all or none; returns and raises what `Replica.replay` does."""
        before, name, digests = (self.theta, self.version), self._name, list[bytes]()
        try:
            for change in changes:
                digests.append(self._follow(change))
        except BaseException:
            super().load(*before)
            self._name = name
            raise
        return tuple(digests)

    def _follow(self, change: Change) -> bytes:
        if self._name is None:
            self._name = digest(self.theta)
        terms, displacement = change
        key = (self._name, self.version, tuple(terms), None if displacement is None else displacement.tobytes())
        after_it = self._thetas.after
        found = after_it.get(key)
        if found is None:
            (after,) = super().replay([change])
            found = self.theta, after if any(after) else _name_after(key), after
            after_it[key] = found
            if len(after_it) > self._thetas.kept:
                after_it.popitem(last=False)
        else:
            super().load(found[0], self.version + 1)
        self._name = found[1]
        return found[2]


def _name_after(key: _Key) -> bytes:
    """A name for a theta whose digest is not due: of how it came about."""
    name, version, terms, displacement = key
    return short_hash(b"".join([name, b"%d" % version, pack_terms(terms, aged=True), displacement or b""]))
