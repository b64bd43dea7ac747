"""The loss of a round, as logs, ledger and report say it, and whether a run's loss rises well above the base's.

Where it does, the run diverges, and its learning rate is too high.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from meerkat_mq.ledger.store import Store
from meerkat_mq.rounds.records import NOT_REFUSED, UpdateRecord, Verdict

REMEDY: Final = "lower rounds.lr"
FIRST: Final = 3  # rounds whose median is the base's loss on the nodes' rows: theta has hardly moved yet
LAST: Final = 8  # rounds that all have to be above it: the losses of batches are noisy
ON_BATCHES: Final = 1.5  # times the base's
ON_HELD_OUT: Final = 1.2  # … on the same held-out rows each time


def mean_loss(records: Sequence[UpdateRecord]) -> float | None:
    """Mean over the updates of a round that were not refused; None if there is none."""
    losses = [record.loss for record in records if record.verdict in NOT_REFUSED]
    return math.fsum(losses) / len(losses) if losses else None


def watched_loss(records: Sequence[UpdateRecord]) -> float | None:
    """The same for who watches whether the run diverges: NaN where every update was refused as not finite."""
    hopeless = bool(records) and all(record.verdict is Verdict.NOT_FINITE for record in records)
    return math.nan if hopeless else mean_loss(records)


class RisingLoss:
    """Is told of the losses as they come; says once that they rise."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=LAST)
        self._held_out: float | None = None
        self.warning = ""  # what it said

    def closed(self, number: int, loss: float) -> str:
        """A round closed; returns the warning, "" where there is nothing to say, or it was said.

        Args:
            number: of the round.
            loss: mean over its accepted updates; not finite where none could be accepted, since no loss is finite.
        """
        if not math.isfinite(loss):
            return self._warn(f"the loss of round {number:,} is not finite")
        if len(self._first) < FIRST:
            self._first.append(loss)
            return ""
        self._last.append(loss)
        base = statistics.median(self._first)
        if len(self._last) < LAST or min(self._last) <= ON_BATCHES * base:
            return ""
        return self._warn(f"the loss rises: {loss:.3g} in round {number:,}, {base:.3g} at the start")

    def evaluated(self, version: int, loss: float) -> str:
        """theta of a version was evaluated; likewise."""
        if not math.isfinite(loss):
            return self._warn(f"the held-out loss after {version:,} rounds is not finite")
        if version == 0:
            self._held_out = loss
        if self._held_out is None or loss <= ON_HELD_OUT * self._held_out:
            return ""
        return self._warn(f"the held-out loss rises: {loss:.3g} after {version:,} rounds, {self._held_out:.3g} before")

    def _warn(self, problem: str) -> str:
        if self.warning:
            return ""
        self.warning = f"{problem}; {REMEDY}"
        return self.warning


def rising_from(ledger: Store) -> RisingLoss:
    """Watches a run from where its ledger stands: knows the losses of its first rounds, and of its base."""
    return _told(ledger, range(min(FIRST, ledger.version)), versions=[0])


def rising_now(ledger: Store) -> str:
    """What is wrong with a run's newest rounds and its newest evaluation; "" if nothing is."""
    metrics, version = ledger.metrics(), ledger.version
    first = range(min(FIRST, version))
    newest = range(max(FIRST, version - LAST), version)
    return _told(ledger, [*first, *newest], versions=[0, max(metrics, default=0)]).warning


def _told(ledger: Store, rounds: Iterable[int], versions: Iterable[int]) -> RisingLoss:
    rising, metrics = RisingLoss(), ledger.metrics()
    for number in rounds:
        if (loss := watched_loss(ledger.records(number))) is not None:
            rising.closed(number, loss)
    for version in versions:
        if (loss := metrics.get(version, {}).get("loss")) is not None:
            rising.evaluated(version, loss)
    return rising
