"""The loss of a round, as logs, ledger and report say it."""

import math
from collections.abc import Iterable, Sequence

from meerkat_mq.ledger.rising import FIRST, LAST, RisingLoss
from meerkat_mq.ledger.store import Store
from meerkat_mq.rounds.guards import NOT_REFUSED
from meerkat_mq.rounds.records import UpdateRecord, Verdict


def mean_loss(records: Sequence[UpdateRecord]) -> float | None:
    """Mean over the updates of a round that were not refused; None if there is none."""
    losses = [record.loss for record in records if record.verdict in NOT_REFUSED]
    return math.fsum(losses) / len(losses) if losses else None


def watched_loss(records: Sequence[UpdateRecord]) -> float | None:
    """The same for who watches whether the run diverges: NaN where every update was refused as not finite."""
    hopeless = bool(records) and all(record.verdict is Verdict.NOT_FINITE for record in records)
    return math.nan if hopeless else mean_loss(records)


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
