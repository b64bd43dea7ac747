"""The guards: which projected gradients the server refuses, and which nodes are flagged for it (docs/guards.md)."""

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from operator import gt, sub

from meerkat_mq.config import GuardsConfig
from meerkat_mq.rounds.clipping import FEWEST, SIGMAS, median, median_magnitude
from meerkat_mq.rounds.cumulative import (
    EVIDENCE,
    OPPOSED,
    Comparison,
    StepColumn,
    compare,
    compare_displacement,
    correlation,
    evidence,
    lane_says,
    slope,
)  # fmt: skip
from meerkat_mq.rounds.policy import COMPARED, MAX_STEP, applicable, lane_of
from meerkat_mq.rounds.records import NOT_REFUSED, UpdateRecord, Verdict

FEWEST_OF_OWN = 8
FEWEST_TO_COMPARE = 10
FLAGGED_AT = 3
FLOOR = 0.5  # a scale is at least this part of the median magnitude
TOLERATED = 0.1  # share of an update's steps that may be outliers: honest updates have some
EXCUSED = 10.0  # a node's own past, where it counts, excuses an outlier of up to so many limits
SPOILT = 0.25  # a flagged node's own past does not count if at least this share of its recent updates was refused
STRICTER = 0.5  # such a node is judged by this part of the limit
AGREES = 0.7
AGREEING = 0.75
OFF = -1.0  # of `guards.against`
ACCEPTED = Verdict.ACCEPTED
Place = tuple[int, int]  # base version and slot: which update of an entry


def place(record: UpdateRecord) -> Place:
    """Which update of an entry it is."""
    return record.version, record.slot


def on_arrival(scalars: Sequence[float], loss: float, lr: float, max_step: float = MAX_STEP) -> Verdict:
    """What can be said of an update alone: NOT_FINITE, TOO_LARGE or ACCEPTED."""
    if not all(map(math.isfinite, (loss, *scalars))):
        return Verdict.NOT_FINITE
    return Verdict.ACCEPTED if applicable(scalars, lr, max_step) else Verdict.TOO_LARGE


@dataclass(slots=True)
class Spread:
    """A robust centre and scale of some projected gradients."""

    centre: float
    scale: float

    @classmethod
    def of(cls, values: Sequence[float], typical: float = 0.0) -> "Spread":
        """Median, and 1.4826 · MAD, at least half the median magnitude or of `typical`; values not empty."""
        centre = median(sorted(values))
        deviation = SIGMAS * median_magnitude([value - centre for value in values])
        return cls(centre, max(deviation, FLOOR * max(median_magnitude(values), typical)))

    def beyond(self, value: float, limit: float) -> bool:
        """Whether a value lies more than `limit` scales from the centre."""
        return abs(value - self.centre) > limit * self.scale


@dataclass(slots=True)
class Near:
    """Within the limit of each step, as most updates are: they need no closer look."""

    centres: list[float]
    widths: list[float]

    @classmethod
    def of(cls, spreads: Sequence[Spread | None], limit: float) -> "Near":
        """Of the first steps: those with a spread."""
        known = [spread for spread in spreads if spread is not None]
        return cls([spread.centre for spread in known], [limit * spread.scale for spread in known])

    def holds(self, scalars: Sequence[float]) -> bool:
        """Whether these projected gradients are all near."""
        distances = map(abs, map(sub, scalars, self.centres))
        return len(scalars) <= len(self.centres) and not any(map(gt, distances, self.widths))


@dataclass(slots=True)
class NodePast:
    """What a node did within the window.

    Attributes:
        comparisons: of each record with the lane's others; None where that cannot be.
    """

    records: deque[UpdateRecord] = field(default_factory=deque)  # oldest first
    comparisons: deque[Comparison | None] = field(default_factory=deque)
    refused: int = 0  # how many of the records were
    compared: int = 0  # how many have a comparison
    agreed: int = 0  # steps in which the node moved as the others
    opposed: int = 0  # steps in which it moved against them

    def add(self, record: UpdateRecord, comparison: Comparison | None) -> None:
        """The newest round's."""
        self.records.append(record)
        self.comparisons.append(comparison)
        self._count(record, comparison, 1)

    def forget(self) -> None:
        """The oldest round has left the window."""
        self._count(self.records.popleft(), self.comparisons.popleft(), -1)

    def _count(self, record: UpdateRecord, comparison: Comparison | None, sign: int) -> None:
        if record.verdict not in NOT_REFUSED:
            self.refused += sign
        if comparison is not None:
            self.compared += sign
            self.agreed += sign * comparison.agreed
            self.opposed += sign * comparison.opposed

    @property
    def comparable(self) -> bool:
        """Whether enough rounds tell if the node agrees with its lane."""
        return self.compared >= FEWEST_TO_COMPARE

    @property
    def agrees(self) -> bool:
        """Whether the node mostly moves as its lane does."""
        return self.agreed >= AGREES * (self.agreed + self.opposed)

    def spread(self) -> Spread | None:
        """Of the accepted projected gradients; None where there are too few.

        A path on which the node was early-stopped is left out: most of it is far smaller than first steps are.
        """
        values = _scalars(record for record in self.records if record.verdict == ACCEPTED)
        return Spread.of(values) if len(values) >= FEWEST_OF_OWN else None


class Guard:
    """Judges a round's updates by each other and by the rounds before: a function of the last `window` rounds alone."""

    def __init__(
        self,
        config: GuardsConfig,
        lanes: int,
        past: Iterable[Sequence[UpdateRecord]] = (),
        *,
        cumulative: bool = False,
    ) -> None:
        """Begin with the records of the newest `window` closed rounds, oldest first, as the ledger has them.

        `cumulative`: whether the cumulative test says who works against the others, as in runs with the clipped mean.
        """
        self._config = config
        self._cumulative = cumulative
        self._lanes = lanes
        self._rounds: deque[Sequence[UpdateRecord]] = deque()
        self._nodes: dict[str, NodePast] = {}
        self._typical: deque[float | None] = deque(maxlen=config.window)
        for records in past:
            self.remember(records)

    def judge(self, records: Sequence[UpdateRecord]) -> tuple[UpdateRecord, ...]:
        """The round's records, in their order, with final verdicts; keeps nothing."""
        verdicts: dict[Place, Verdict] = {}
        for members in self._by_lane(records).values():
            verdicts |= self._against(members)
        if self._cumulative and self._config.against > OFF:
            verdicts |= dict.fromkeys(self._opposed(records), Verdict.AGAINST)
        candidates = [record for record in _accepted(records) if not record.values and place(record) not in verdicts]
        verdicts |= dict.fromkeys(self._outliers(candidates), Verdict.OUTLIER)
        for record in self._trusted(records):
            verdicts.pop(place(record), None)
        if not verdicts:
            return tuple(records)
        return tuple(
            replace(record, verdict=verdicts.get(place(record), ACCEPTED)) if record.verdict == ACCEPTED else record
            for record in records
        )

    def remember(self, records: Sequence[UpdateRecord]) -> None:
        """A round was committed with these records."""
        if len(self._rounds) == self._config.window:
            self._forget(self._rounds.popleft())
        self._rounds.append(records)
        comparisons = self._displacements(records)
        ordered: list[list[float]] = []
        for members in self._by_lane(records).values():
            values = _columns(_accepted(members))
            ordered += values
            columns = [StepColumn.of(column) for column in values]
            trusted = [median(column) for column in _columns(self._trusted(members))]
            others = [record for record in members if not (trusted and record.node in self._config.trusted)]
            comparisons |= {place(record): compare(record, columns, trusted) for record in others}
        self._typical.append(median_magnitude(chain.from_iterable(ordered)) if ordered else None)
        for record in records:
            self._nodes.setdefault(record.node, NodePast()).add(record, comparisons.get(place(record)))

    @property
    def flagged(self) -> Mapping[str, Verdict]:
        """Nodes that stand out over the window, and the verdict that they got most."""
        found = {}
        for node, past in self._nodes.items():
            if past.refused >= FLAGGED_AT or past.records[-1].verdict == Verdict.AGAINST:
                counts = Counter(record.verdict for record in past.records if record.verdict not in NOT_REFUSED)
                found[node] = max(counts, key=lambda verdict: (counts[verdict], verdict))
        return found

    def _forget(self, records: Sequence[UpdateRecord]) -> None:
        for record in records:
            past = self._nodes[record.node]
            past.forget()
            if not past.records:
                del self._nodes[record.node]

    def _by_lane(self, records: Iterable[UpdateRecord]) -> dict[tuple[int, int], list[UpdateRecord]]:
        """Projected gradients along the same directions: by base version and lane; displacements have none."""
        lanes: dict[tuple[int, int], list[UpdateRecord]] = {}
        for record in records:
            if record.values is None:
                lanes.setdefault((record.version, lane_of(record.slot, self._lanes)), []).append(record)
        return lanes

    def _trusted(self, members: Iterable[UpdateRecord]) -> list[UpdateRecord]:
        """Those with whom the others are compared, and whom the others do not judge."""
        return [record for record in _accepted(members) if record.node in self._config.trusted]

    def _against(self, members: Sequence[UpdateRecord]) -> dict[Place, Verdict]:
        """Updates of nodes that work against a lane that otherwise agrees."""
        known = [
            (place(record), past)
            for record in members
            if (past := self._nodes.get(record.node)) is not None and past.comparable
        ]
        if self._cumulative:
            found = [where for where, past in known if self._takes_back(past)]
            sure = bool(self._trusted(members)) or 2 * len(found) < len(members)
            decided = self._config.against > OFF and sure
            return dict.fromkeys(found, Verdict.AGAINST) if decided else {}
        agreeing = sum([past.agrees for _, past in known])
        if agreeing < max(FEWEST, AGREEING * (len(known) - 1)):
            return {}
        return {
            where: Verdict.AGAINST
            for where, past in known
            if past.opposed > past.agreed and correlation(past.comparisons) < self._config.against
        }

    def _takes_back(self, past: NodePast) -> bool:
        """Whether a node surely works against the others, and undoes too much of what they do."""
        return evidence(past.comparisons) < EVIDENCE and slope(past.comparisons) <= -self._config.takes_back

    def _displacements(self, records: Sequence[UpdateRecord]) -> dict[Place, Comparison | None]:
        """The comparisons of a round's displacements with its paths."""
        moved = [(place(record), record.moved) for record in records if record.moved is not None]
        lanes = {lane: self._says(members) for lane, members in self._by_lane(records).items()} if moved else {}
        compared = range(min(self._lanes, COMPARED))
        return {
            where: compare_displacement(one, [lanes.get((where[0], lane), ()) for lane in compared])
            for where, one in moved
        }

    def _says(self, members: Sequence[UpdateRecord]) -> Sequence[float]:
        columns = [StepColumn.of(column) for column in _columns(_accepted(members))]
        return lane_says(columns, [median(column) for column in _columns(self._trusted(members))])

    def _opposed(self, records: Sequence[UpdateRecord]) -> set[Place]:
        """Displacements that work against the entry's others, or against the paths over the window and now."""
        now = self._displacements(_accepted(records))
        moved = [(record, record.moved) for record in records if place(record) in now and record.moved is not None]
        apart = {place(record) for record, one in moved if one.agreement < OPPOSED}
        against = {
            place(record)
            for record, _ in moved
            if evidence([*self._nodes.get(record.node, NodePast()).comparisons, now[place(record)]]) < EVIDENCE
        }
        return against | apart if 2 * len(apart) < len(moved) else against

    def _outliers(self, candidates: Sequence[UpdateRecord]) -> list[Place]:
        """Updates with outliers."""
        window = sorted([typical for typical in self._typical if typical is not None])
        typical = median(window) if window else 0.0
        lanes = [(members, _columns(members)) for members in self._by_lane(candidates).values()]
        few = any(len(column) < FEWEST for _, columns in lanes for column in columns)
        overall = self._overall(candidates, typical, len(window)) if few else None
        found = []
        for members, columns in lanes:
            spreads = [Spread.of(column, typical) if len(column) >= FEWEST else overall for column in columns]
            near = Near.of(spreads, self._config.outlier)
            found += [place(record) for record in members if self._is_outlier(record, spreads, near)]
        return found

    def _overall(self, candidates: Sequence[UpdateRecord], typical: float, rounds: int) -> Spread | None:
        """For lanes with too few nodes: the magnitudes of all lanes' projected gradients can be compared."""
        if len(candidates) >= FEWEST:
            typical = max(typical, median_magnitude(_scalars(candidates)))
        elif rounds < FEWEST_OF_OWN:
            return None
        return Spread(0.0, SIGMAS * typical)

    def _is_outlier(self, record: UpdateRecord, spreads: Sequence[Spread | None], near: Near) -> bool:
        past = self._nodes.get(record.node)
        past_counts = past is None or past.refused < max(FLAGGED_AT, SPOILT * len(past.records))
        if past_counts and near.holds(record.scalars):
            return False
        limit = self._config.outlier * (1.0 if past_counts else STRICTER)
        far = [
            (scalar, lane)
            for scalar, lane in zip(record.scalars, spreads, strict=False)
            if lane is None or lane.beyond(scalar, limit)
        ]
        if not far:
            return False
        own, outliers = past.spread() if past is not None else None, 0
        for scalar, lane in far:
            scale, excuse = (lane, own if past_counts else None) if lane is not None else (own, None)
            if scale is None:
                continue
            if scale.beyond(scalar, EXCUSED * limit):
                return True
            outliers += scale.beyond(scalar, limit) and (excuse is None or excuse.beyond(scalar, limit))
        return outliers > TOLERATED * len(record.scalars)


def _accepted(records: Iterable[UpdateRecord]) -> list[UpdateRecord]:
    return [record for record in records if record.verdict in NOT_REFUSED]


def _scalars(records: Iterable[UpdateRecord]) -> list[float]:
    return [scalar for record in records for scalar in record.scalars]


def _columns(records: Sequence[UpdateRecord]) -> list[list[float]]:
    """The records' projected gradients, sorted, by step."""
    steps = zip_longest(*[record.scalars for record in records])
    return [sorted([scalar for scalar in step if scalar is not None]) for step in steps]
