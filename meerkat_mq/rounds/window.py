"""Which updates may still count, and which are taken or committed: those from theta of the newest versions."""

from collections.abc import Iterable, Mapping

from meerkat_mq.core import metrics as m
from meerkat_mq.core.path import NO_DIGEST, Entry
from meerkat_mq.rounds.records import UpdateRecord

Committed = dict[tuple[int, str], UpdateRecord]  # by base version and node


class Window:
    """Which updates may still count: those from theta of the versions head − max_staleness to head.

    In a synchronous run that is the head alone. A node has at most one update for each base version. After it, the
    window takes none from an older version of the same node.

    Attributes:
        acknowledged: slot to the newest base version of a committed update.
    """

    def __init__(
        self, head: int, max_staleness: int, bases: Mapping[int, bytes], updates: Iterable[UpdateRecord]
    ) -> None:
        """Resume at `head` with its due digests by version, and with the committed updates that are in no entry yet."""
        self._max_staleness = max_staleness
        self._bases = dict(bases)
        self._newest: dict[str, int] = {}
        self._fetched: dict[str, int] = {}
        self._waiting: Committed = {}
        self.head = head
        self.acknowledged: dict[int, int] = {}
        for record in sorted(updates, key=lambda record: record.version):
            self.take(record.node, record.version)
            self.committed(record)
            self.wait(record)

    def resume(self, node: str, slot: int, base: int) -> None:
        """Resume: the newest update of a node was from theta of `base`."""
        self._newest[node] = max(base, self._newest.get(node, base))
        self._acknowledge(slot, base)

    def base(self, version: int) -> bytes | None:
        """The digest that an update from theta of `version` names; None where it is too late or too early for one."""
        return self._bases.get(version)

    def spans(self, base: int, entry: int) -> bool:
        """Whether an update from theta of `base` may enter an entry."""
        return entry - self._max_staleness <= base <= entry

    def why_late(self, node: str, base: int, entry: int) -> m.Metric | None:
        """Why an update cannot enter an entry any more; None: it can."""
        if base > self.head:
            return m.EARLY
        if base not in self._bases or not self.spans(base, entry):
            return m.LATE
        return m.DUPLICATE if base <= max(self._newest.get(node, -1), self._fetched.get(node, -1)) else None

    def take(self, node: str, base: int) -> None:
        """Take a node's update; whether it is committed yet does not matter."""
        self._newest[node] = base

    def took(self, node: str, base: int) -> bool:
        """Whether the newest update that was taken of a node is from theta of `base`."""
        return self._newest.get(node) == base

    def fetch(self, node: str, base: int) -> None:
        """The server began to fetch the displacement of a node's update."""
        self._fetched[node] = base

    def fetched(self, node: str, base: int) -> bool:
        """The fetch of a displacement has ended, with the displacement or without; False if there was no such fetch."""
        if self._fetched.get(node) != base:
            return False
        del self._fetched[node]
        return True

    def committed(self, record: UpdateRecord) -> None:
        """The ledger holds an update."""
        self._acknowledge(record.slot, record.version)

    def _acknowledge(self, slot: int, base: int) -> None:
        self.acknowledged[slot] = max(base, self.acknowledged.get(slot, base))

    def wait(self, record: UpdateRecord) -> None:
        """Keep a committed update that came too late for the closing entry, for the next one."""
        self._waiting[record.version, record.node] = record

    def open(self) -> Committed:
        """Hand over the updates that waited for the head's entry, without those that are too old for it."""
        waiting, self._waiting = self._waiting, {}
        return {place: record for place, record in waiting.items() if self.spans(record.version, self.head)}

    def advance(self, entry: Entry) -> None:
        """The head's entry is committed."""
        base = self._bases[self.head] if entry.digest == NO_DIGEST else entry.digest
        self.head += 1
        kept = {version: known for version, known in self._bases.items() if self.spans(version, self.head)}
        self._bases = kept | {self.head: base}
