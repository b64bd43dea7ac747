"""What a campaign must come by at least once: a fault schedule that never gets anywhere proves nothing.

Names are those of core/metrics.py, of faults, and of what is seen here: at the broker, and in the final ledger.
"""

from collections import Counter
from collections.abc import Iterable

from meerkat_mq.core import metrics as m
from meerkat_mq.errors import AnotherServer, LedgerError, MeerkatError
from meerkat_mq.rounds.records import Verdict
from meerkat_mq.simulate.history import History
from meerkat_mq.simulate.schedule import KINDS, LOSSES
from meerkat_mq.wire.messages import Chunk, Entries, Frame, Offer, Refusal, Round, Want, Welcome

ENOUGH = 2000  # schedules, in which every one of these is met many times, or a few times at least

_METRICS = (
    m.LATE, m.EARLY, m.DUPLICATE, m.NOT_ASKED, m.EXTENDED, m.HIGHER_TERM, m.UNEXPECTED, m.DIED, m.LEFT, m.LATE_DEATH,
    m.ANOTHER_RUN, m.ANOTHER_TERM, m.UNDECODABLE.of("BadValue"), m.STALE_SERVER, m.STALE_TERM, m.OLD_ROUND,
    m.RESYNCHRONISED, m.DIGEST_DIFFERS, m.ENTRIES_MISSED, m.LATE_STEP, m.FLAGGED.of("against"), m.FLAGGED.of("outlier"),
    m.REFUSED.of("against"), m.REFUSED.of("outlier"), m.REFUSED.of("not finite"), m.REFUSED.of("no values"),
    m.REFUSED.of("resynchronise"), m.REFUSED.of("wrong seeds"), m.REFUSED.of("wrong steps"),
    m.UNDECODABLE.of("BadChecksum"), m.SNAPSHOT_MISSED, m.FLAGGED.of("over budget"), m.FLAGGED.of("silent"),
    m.FLAGGED.of("raises terms"), m.OVER_BUDGET, m.TERM_KEPT, m.IMPOSSIBLE_TERM,
)  # fmt: skip

OFFERED = "a snapshot was offered"
TWICE = "an entry was fetched twice"
FENCED = "a term was lost in mid-commit"
ANOTHER = "a server found another one online"
DAMAGED = "a server found its ledger damaged, and ended"
CRASHED = "a process crashed between two effects"
STALE = "an entry took a stale update"
PARTIAL = "an entry took a part of a path"
DISPLACED = "an entry has a displacement"
STOPPED = "a node was early-stopped"
WAITING = "the run ended with updates in no entry"
WILL = "a last will was published"
ASLEEP = "a node went to sleep"
OVERDUE = "a round closed at its deadline"
NOT_KEPT = "a node's full disk took no update"
WITHOUT = "the run finished without a node"
EARLIER = "a node of an earlier release took part"
UP_TO_DATE = "a node of an earlier release was brought up to date"

_FRAMES: dict[type[Frame], str] = {
    Round: "a round was published",
    Welcome: "a node was welcomed",
    Entries: "entries were sent",
    Offer: OFFERED,
    Refusal: "an update was refused",
    Chunk: "a chunk was sent",
    Want: "a want was sent",
}
_WANTS = {
    "welcome": "a node introduced itself",
    "entries_from": "entries were asked for",
    "blob": "a blob was asked for",
}


def struck(kind: str, *, for_good: bool = False) -> str:
    """A kind of fault struck."""
    return f"fault: {kind}{' for good' * for_good}"


REACHED = (
    *_METRICS, *_FRAMES.values(), *_WANTS.values(), TWICE, FENCED, ANOTHER, DAMAGED, CRASHED, STALE, PARTIAL, DISPLACED,
    STOPPED, WAITING, WILL, ASLEEP, OVERDUE, NOT_KEPT, EARLIER, UP_TO_DATE, *map(struck, KINDS),
)  # fmt: skip


LIVENESS = (*(struck(kind, for_good=True) for kind in (*LOSSES, "disk full", "poison")), WITHOUT)


class Reached(Counter[str]):
    """What was met in one federation."""

    def __init__(self) -> None:
        super().__init__()
        self._sent: set[tuple[str, int, bytes]] = set()

    def saw(self, topic: str, frame: Frame) -> None:
        """A frame has reached the broker."""
        self[_FRAMES.get(type(frame), "an update was sent")] += 1
        if isinstance(frame, Want):
            for name, words in _WANTS.items():
                asked = getattr(frame, name)
                self[words] += asked is not None and asked is not False
        elif isinstance(frame, Entries):
            sent = {(topic, entry.version, entry.digest) for entry in frame.entries}
            self[TWICE] += bool(sent & self._sent)
            self._sent |= sent

    def saw_status(self, status: str) -> None:
        """A server or a node said something, or the broker in its name."""
        self[WILL] += status == "lost"
        self[ASLEEP] += status == "asleep"

    def ended(self, error: MeerkatError) -> None:
        """An error ended a process."""
        if isinstance(error, AnotherServer):
            self[FENCED if error.where.startswith("ledger") else ANOTHER] += 1
        elif isinstance(error, LedgerError):
            self[DAMAGED] += 1

    def saw_ledger(self, history: History) -> None:
        """The final ledger."""
        settings = history.settings
        for version, (entry, records) in enumerate(zip(history.entries, history.records, strict=False)):
            whole = settings.perturbations * settings.steps_of(version)
            self[STALE] += any(record.version < version for record in records)
            self[PARTIAL] += any(0 < len(record.scalars) < whole for record in records)
            self[DISPLACED] += entry.displacement is not None
            self[STOPPED] += any(record.verdict is Verdict.EARLY_STOPPED for record in records)
        self[WAITING] += bool(history.open_updates)


def missing(reached: Counter[str], expected: Iterable[str]) -> list[str]:
    """What of it was never met."""
    return [name for name in expected if not reached[name]]
