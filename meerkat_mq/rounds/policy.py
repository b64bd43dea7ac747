"""The rules of a round that need no state: who is asked, who walks which lane, what an entry says."""

import hashlib
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from meerkat_mq.config import Directions, EarlyStoppingConfig, GuardsConfig, RoundRules, ServerValuesConfig
from meerkat_mq.core.path import Coefficient, Entry, coefficient, seeds_of
from meerkat_mq.errors import ConfigError
from meerkat_mq.rounds.clipping import FEWEST, clipped, longest
from meerkat_mq.rounds.records import JUDGED, Share, UpdateRecord, Verdict
from meerkat_mq.wire.frames import MAX_FRAME_BYTES, MAX_STEPS, Reason, Update, entry_bytes, most_terms

DEADLINE_CAP = 10
WHOLE = 256  # a staleness weight of 1
ANNOUNCE_AT = (0.25, 0.5, 0.75)
ROUND_ENTRY_BYTES = 1024
NEWEST_ENTRY_BYTES = 16 * 1024
COMPARED = 32  # directions of a round along which a displacement is measured; `verify` replays it
MAX_STEP = 2.0**64  # 2³² versions of 12,000 terms, of directions whose values lie within ±5, stay below 2¹¹⁴


class RoundSettings(RoundRules):
    """What rules a run's rounds."""

    run_id: bytes
    mask_hash: bytes
    directions: Directions
    guards: GuardsConfig = GuardsConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    values: ServerValuesConfig = ServerValuesConfig()
    measured: bool = False  # whether the mask's g_p tells anything, so that GradIP is kept
    max_step: float = MAX_STEP  # the largest |lr·g| of an update
    weights: int = 1  # n, of theta
    frame_bytes: int = MAX_FRAME_BYTES  # of the largest frame that the broker takes

    def model_post_init(self, context: object, /) -> None:
        """Refuse, as ConfigError, what no round can be: more lanes than nodes, more directions than a frame holds."""
        fewest = max(share(self.fraction, self.min_nodes), min(self.min_updates, self.min_nodes))
        if self.directions > fewest:
            raise ConfigError(
                "rounds.directions",
                f"{self.directions} lanes are more than the {fewest} nodes that a round may have",
                "lower directions, or raise min_nodes or fraction",
            )
        if self.early_stopping.by == "vpcs" and not self.measured:
            raise ConfigError(
                "early_stopping.by", "vpcs needs the pre-training gradient, and the mask's g_p is zero", "score a mask"
            )
        lanes, most = self.directions, most_terms(aged=self.max_staleness > 0)
        asked = {"rounds.local_steps": self.local_steps}
        if self.early_stops:
            asked["early_stopping.calibration_steps"] = self.early_stopping.calibration_steps
        for name, steps in asked.items():
            scalars = steps * self.perturbations
            if scalars > MAX_STEPS or lanes * scalars * (self.max_staleness + 1) > most:
                versions = f" × {self.max_staleness + 1} versions" * self.buffered
                raise ConfigError(
                    name,
                    f"{steps} × {self.perturbations} perturbations × {lanes} lanes{versions} do not fit a round",
                    f"an update holds {MAX_STEPS} projected gradients, an entry {most} terms",
                )

    @property
    def fewest_nodes(self) -> int:
        """How many nodes must be at hand before a round opens."""
        return max(self.min_nodes, self.min_updates)

    @property
    def buffered(self) -> bool:
        """Whether versions take what comes instead of waiting for their nodes."""
        return self.mode == "buffered"

    def reach(self, steps: int) -> float:
        """The largest root mean square of a displacement of so many local steps; infinite in a run without a bound."""
        return math.inf if self.max_step >= MAX_STEP else self.max_step * steps

    def staleness_weight(self, age: int) -> int:
        """s(τ) in 256ths, of an update from a theta that is `age` = τ versions old; 0 where that is too old.

        Constant: 1. Polynomial: 1/(1+τ)^a (FedAsync, arXiv 1903.03934), rounded to a whole number of 256ths, so that
        no difference in the last bit of a power can matter.
        """
        if age > self.max_staleness:
            return 0
        if self.staleness == "constant":
            return WHOLE
        return max(1, round(WHOLE * math.pow(1 + age, -self.staleness_exponent)))

    @property
    def clips(self) -> bool:
        """Whether the clipped mean and the cumulative test are in force."""
        return self.aggregate == "clipped-mean"

    @property
    def early_stops(self) -> bool:
        """Whether early stopping changes anything."""
        return self.early_stopping.by != "off" and self.early_stopping.steps < self.local_steps

    def takes_what_comes(self, version: int) -> bool:
        """Whether version `version` closes by its buffer; a calibration, which judges each node, waits for them."""
        return self.buffered and not self.calibrates(version)

    @property
    def acknowledged(self) -> int:
        """Up to which age a round acknowledges updates; a values node must learn that its last one is committed."""
        return max(self.max_staleness, int(self.values.accept))

    def calibrates(self, version: int) -> bool:
        """Whether round `version` is one that shows how skewed each node's data is."""
        every = self.early_stopping.every
        return self.early_stops and (version % every == 0 if every else version == 0)

    def steps_of(self, version: int) -> int:
        """Local steps that round `version` asks of a node that is not early-stopped."""
        return self.early_stopping.calibration_steps if self.calibrates(version) else self.local_steps

    @property
    def most_steps(self) -> int:
        """Local steps that any round asks of a node at most."""
        return max(self.local_steps, self.early_stopping.calibration_steps if self.early_stops else 0)

    def scalars_of(self, version: int) -> int:
        """Directions of round `version` in each lane, and so projected gradients of an update."""
        return self.perturbations * self.steps_of(version)

    def compares(self, record: UpdateRecord) -> bool:
        """Whether it is a displacement that is compared: with the clipped mean, one that can be used."""
        return self.clips and record.values is not None and record.verdict in JUDGED

    def compared(self, version: int) -> tuple[int, int]:
        """Along which directions of round `version` displacements are measured: how many lanes, and steps of each."""
        lanes = min(self.directions, COMPARED)
        return lanes, min(self.scalars_of(version), COMPARED // lanes)

    def fraction_of(self, version: int) -> float:
        """Share of the nodes at hand that round `version` asks: a calibration, which judges each node, asks all."""
        return 1.0 if self.calibrates(version) else self.fraction


def default_lanes(min_nodes: int, fraction: float) -> int:
    """As many lanes as leave each three nodes, which robust statistics inside a lane want; at least one."""
    return max(1, share(fraction, min_nodes) // 3)


def lane_of(slot: int, lanes: int) -> int:
    """The direction lane that the node in a slot walks."""
    return slot % lanes


def sample(run_id: bytes, version: int, slots: Iterable[int], fraction: float, least: int = 1) -> frozenset[int]:
    """The slots that a round asks: those with the lowest SHA-256(run id ‖ "sample" ‖ u32 version ‖ u32 slot).

    A share of them, but `least` where there are so many.
    """

    def rank(slot: int) -> bytes:
        return hashlib.sha256(run_id + b"sample" + struct.pack("<II", version, slot)).digest()

    ranked = sorted(slots, key=rank)
    return frozenset(ranked[: max(share(fraction, len(ranked)), least)])


def share(part: float, count: int) -> int:
    """`part` of `count`, rounded up, at least one; 0.55 of 100 is 55, although 0.55 · 100 > 55 in floating point."""
    return max(1, math.ceil(round(part * count, 9)))


def needed(asked: int, quorum: float) -> int:
    """How many of the nodes asked a round needs."""
    return share(quorum, asked)


def fewest_asked(settings: RoundSettings, version: int) -> int:
    """How many nodes round `version` asks where no more are at hand than a round needs."""
    return share(settings.fraction_of(version), settings.fewest_nodes)


def fewest_needed(settings: RoundSettings, version: int) -> int:
    """What round `version` of `min_nodes` nodes would need: leaves do not take a quorum below it."""
    return needed(share(settings.fraction_of(version), settings.min_nodes), settings.quorum)


def why_refused(update: Update, settings: RoundSettings, *, base: bytes, slot: int, steps: int) -> Reason | None:
    """What is wrong with an update, before its numbers are looked at; None: nothing.

    `base` is the beginning of the newest due digest at or before its version, 8 bytes; `steps` the node was asked for.
    """
    if update.base != base:
        return Reason.RESYNCHRONISE
    if update.values is not None:
        if not settings.values.accept:
            return Reason.NO_VALUES
        return None if update.values.steps <= steps else Reason.WRONG_STEPS
    count, version = len(update.scalars), update.header.version
    if not steps_fit(count, steps, settings):
        return Reason.WRONG_STEPS
    lane = lane_of(slot, settings.directions)
    derived = update.seeds is None or update.seeds == seeds_of(settings.run_id, version, lane, count)
    return None if derived else Reason.WRONG_SEEDS


def steps_fit(scalars: int, steps: int, settings: RoundSettings) -> bool:
    """Whether so many projected gradients are what a node was asked for; in a buffered run, a part of whole steps."""
    made, rest = divmod(scalars, settings.perturbations)
    return rest == 0 and (made == steps or (settings.buffered and 1 <= made < steps))


def applicable(scalars: Iterable[float], lr: float, max_step: float = MAX_STEP) -> bool:
    """Whether every |lr·g|, and so any weighted mean of such, is at most `max_step`: at 2⁶⁴, theta stays in float32."""
    return all(abs(lr * g) <= max_step for g in scalars)


def deadline_length(settings: RoundSettings, version: int, attempt: int) -> float:
    """Seconds from the opening of an attempt to its end: doubles, up to ten times the first.

    A calibration has as many times `deadline_s` as it has times the local steps.
    """
    longer = max(1.0, settings.steps_of(version) / settings.local_steps)
    return settings.deadline_s * longer * min(1 << attempt, DEADLINE_CAP)


def snapshot_due(version: int, settings: RoundSettings) -> bool:
    """Whether theta of this version is kept: the first with a digest of each `snapshot_every` versions."""
    every, step = settings.snapshot_every, settings.digest_every
    return version % step == 0 and version // every != (version - step) // every


def terms_of(records: Sequence[UpdateRecord], settings: RoundSettings, version: int) -> tuple[Coefficient, ...]:
    """FedAvg of the accepted nodes' end points as directions: one term an age, lane and step; zeros left out.

    Σ_k p_k·theta_k^T = theta_v − lr·Σ_t (Σ_k p_k g_k^t)·z_t (DESIGN section 2): p_k = n_k·s(τ_k) ÷ N with N = Σ n over
    the accepted nodes of all lanes, and a node that did fewer steps counts in N and adds nothing to the later ones.
    s(τ) is the staleness weight of an update from theta of `version` − τ, 1 in a synchronous run (FedBuff, arXiv
    2106.06639); values nodes count in N too.

    "clipped-mean", the default: as "mean", of g_k that are clipped first (`rounds.clipping`), in float64.
    "mean": c = float32(lr · (fsum(n_k·s·g_k) / N)), s in 256ths and so N · 256. "trimmed-mean": of the m accepted nodes
    that walked the lane's step, sorted by (g, slot), the first and the last ⌊trim·m⌋ are left out (trim·m rounded to
    nine decimals first; at least one node stays). With A = Σ n over the m and B = Σ n over those kept, c = float32(lr ·
    (fsum(n_k·s·g_k) / (N·B/A))), the sum over those kept: the trimmed lane's weighted mean, with the weight that the
    whole lane has in the mean. The quotient N·B/A of integers is rounded once to float64; where nothing is left out it
    is N, and c as of "mean".

    Of a calibration the first `local_steps` steps count, of an early-stopped record the first `early_stopping.steps`.
    With K perturbations a step, lr is lr/K.
    Without an accepted record there are no terms.

    Args:
        records: of the entry, with their verdicts.
        settings: of the run.
        version: of the entry.
    """
    accepted = [found for record in records if (found := counted(record, settings)) is not None]
    total = WHOLE * sum(record.weight for record in accepted)
    trim = settings.trim if settings.aggregate == "trimmed-mean" else 0.0
    lanes: dict[tuple[int, int], list[UpdateRecord]] = {}
    for record in accepted:
        if record.values is None:
            place = (version - record.version, lane_of(record.slot, settings.directions))
            lanes.setdefault(place, []).append(record)
    terms = []
    for (age, lane), members in sorted(lanes.items()):
        part = settings.staleness_weight(age)
        lengths = {len(record.scalars) for record in members}
        for step in range(max(lengths)):
            if step == 0 or step in lengths:  # fewer have walked this step
                walked = [record for record in members if step < len(record.scalars)]
                lane_weight = sum([record.weight for record in walked])
            kept = trimmed(walked, step, trim)
            kept_weight = lane_weight if kept is walked else sum([record.weight for record in kept])
            values = [record.scalars[step] for record in kept]
            if settings.clips:
                values = clipped(values, entry_scalars(lanes, step) if len(values) < FEWEST else ())
            scalars = [(record.weight * part, value) for record, value in zip(kept, values, strict=True)]
            c = coefficient(settings.lr / settings.perturbations, scalars, total * kept_weight / lane_weight)
            if c != 0.0:
                terms.append(Coefficient(lane, step, c, age))
    return tuple(terms)


def entry_scalars(lanes: Mapping[tuple[int, int], Sequence[UpdateRecord]], step: int) -> list[float]:
    """All scalars of one step, whatever their lane."""
    return [record.scalars[step] for members in lanes.values() for record in members if step < len(record.scalars)]


def shares_of(records: Sequence[UpdateRecord], settings: RoundSettings, version: int) -> tuple[Share, ...]:
    """The parts of the mean displacement: n_k·s(τ_k) ÷ N, in float64, by version and slot; as in `terms_of`.

    With the clipped mean, a displacement that goes farther than `longest` has a part that is as many times smaller.
    """
    found = _lengths(records, settings)
    total = WHOLE * sum(record.weight for record, _ in found)
    return tuple(
        Share(record.values.blob, record.weight * settings.staleness_weight(version - record.version) / total * part)
        for record, part in sorted(found, key=lambda one: (one[0].version, one[0].slot))
        if record.values is not None
    )


def shortened(records: Sequence[UpdateRecord], settings: RoundSettings) -> list[str]:
    """The nodes of whose displacements less than half is in the mean, since they go much farther than others."""
    return [record.node for record, part in _lengths(records, settings) if part < 0.5]


def _lengths(records: Sequence[UpdateRecord], settings: RoundSettings) -> list[tuple[UpdateRecord, float]]:
    """The accepted records, as they count, each with the part that its displacement's length may have.

    It is 1 for a path, and for a trusted node's displacement.
    """
    accepted = [found for record in records if (found := counted(record, settings)) is not None]
    reach = _reach(accepted, settings, compared=sum(map(settings.compares, records)))
    spared = () if settings.displacement_reach is None else settings.guards.trusted
    return [(record, 1.0 if record.node in spared else _part(record, reach)) for record in accepted]


def _reach(accepted: Sequence[UpdateRecord], settings: RoundSettings, compared: int) -> float:
    """The root mean square of a displacement for each local step; of a path it is lr/K · √Σg² in all."""
    displacements = [
        (record.moved.size, record.values.steps)
        for record in accepted
        if record.moved is not None and record.values is not None
    ]
    each = settings.lr / settings.perturbations
    paths = [
        each * math.sqrt(math.fsum([g * g for g in record.scalars])) * settings.perturbations / len(record.scalars)
        for record in accepted
        if displacements and record.values is None
    ]
    part = settings.displacement_reach
    return longest(displacements, paths, None if part is None else part / math.sqrt(settings.weights), compared)


def _part(record: UpdateRecord, reach: float) -> float:
    if record.moved is None or record.values is None or record.moved.size == 0:
        return 1.0
    return min(1.0, reach * record.values.steps / record.moved.size)


def counted(record: UpdateRecord, settings: RoundSettings) -> UpdateRecord | None:
    """What of an update enters the entry: no more than a round's local steps, also of a calibration; None: nothing."""
    if record.verdict is Verdict.EARLY_STOPPED:
        return _cut(record, settings.early_stopping.steps * settings.perturbations)
    return _cut(record, settings.local_steps * settings.perturbations) if record.verdict is Verdict.ACCEPTED else None


def _cut(record: UpdateRecord, scalars: int) -> UpdateRecord:
    return record if len(record.scalars) <= scalars else replace(record, scalars=record.scalars[:scalars])


def trimmed(records: Sequence[UpdateRecord], step: int, trim: float) -> Sequence[UpdateRecord]:
    """The records without the ⌊trim·m⌋ smallest and as many largest projected gradients of a step; ties by slot."""
    cut = min(math.floor(round(trim * len(records), 9)), (len(records) - 1) // 2)
    if cut == 0:
        return records
    ordered = sorted(records, key=lambda record: (record.scalars[step], record.slot))
    return ordered[cut:-cut]


def newest_that_fit(entries: Sequence[Entry], limit: int = ROUND_ENTRY_BYTES) -> tuple[Entry, ...]:
    """The longest run of newest entries that encodes to at most `limit` bytes; the newest itself up to 16 KiB.

    So a node that followed so far needs no reply, whatever the number of local steps.
    """
    if not entries:
        return ()
    size, first = entry_bytes(entries[-1]), len(entries) - 1
    if size > NEWEST_ENTRY_BYTES:
        return ()
    while first > 0 and (size := size + entry_bytes(entries[first - 1])) <= limit:
        first -= 1
    return tuple(entries[first:])
