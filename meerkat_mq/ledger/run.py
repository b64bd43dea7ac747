"""A run: what is fixed of it, and the rules under which it was begun."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from meerkat_mq.config import Codec, EarlyStoppingConfig, GuardsConfig, RoundsConfig, ServerValuesConfig
from meerkat_mq.core.mask import Mask
from meerkat_mq.errors import RunMismatch
from meerkat_mq.rounds.guards import FEWEST_IN_LANE
from meerkat_mq.rounds.policy import MAX_STEP, RoundSettings
from meerkat_mq.wire.arrays import split
from meerkat_mq.wire.descriptor import MAY_CHANGE, RunDescriptor
from meerkat_mq.wire.frames import Chunk, Header

_RENAMED = {"rounds": "rounds.count", "weights": "toy_weights", "values": "values.accept"} | {
    key: f"rounds.{key}"
    for key in (
        "stream", "local_steps", "directions", "lr", "eps", "perturbations", "batch_size", "digest_every", "mode",
        "max_staleness",
    )
}  # fmt: skip
_HASHES = {"mask", "fingerprint", "tokenizer"}  # say less than what else differs with them
_FIXED_GUARDS = ("max_step",)
_FIXED_RULES = ("aggregate", "trim", "weigh_by_rows", "staleness", "staleness_exponent")


@dataclass(frozen=True)
class Run:
    """All that is fixed of a run.

    Attributes:
        rules: of this start, as the ledger keeps those of the first.
    """

    descriptor: RunDescriptor
    settings: RoundSettings
    mask: Mask
    blob: bytes
    rules: Mapping[str, Any]

    @property
    def codec(self) -> Codec:
        """How mean displacements are encoded."""
        return codec_of(self.rules)

    def chunks(self, term: int) -> list[Chunk]:
        """The mask's chunks as a server of this term publishes them."""
        run = self.descriptor
        return split(Header.of(run.run_id, term, 0, run.mask_hash), run.mask_name, self.blob)


def settings_of(run: RunDescriptor, rules: Mapping[str, Any], *, measured: bool = True) -> RoundSettings:
    """What rules a run's rounds: the descriptor says what is fixed, the rules the rest.

    Args:
        run: the run.
        rules: as the ledger keeps them.
        measured: whether the mask's g_p is other than zero; who only reads a ledger need not know.

    Raises:
        ConfigError: the rules do not go together: more lanes than nodes, or more steps than a round takes.
    """
    rounds, guards = RoundsConfig(**rules["rounds"]), GuardsConfig(**rules["guards"])
    return RoundSettings(
        run_id=run.run_id,
        mask_hash=run.mask_hash,
        count=run.rounds,
        local_steps=run.local_steps,
        directions=run.directions,
        lr=run.lr,
        eps=run.eps,
        min_nodes=rounds.min_nodes,
        min_updates=rounds.min_updates,
        fraction=rounds.fraction,
        quorum=rounds.quorum,
        deadline_s=rounds.deadline_s,
        grace_s=rounds.grace_s,
        weigh_by_rows=rounds.weigh_by_rows,
        aggregate=rounds.aggregate,
        trim=rounds.trim,
        snapshot_every=rounds.snapshot_every,
        digest_every=run.digest_every,
        guards=guards,
        perturbations=run.perturbations,
        early_stopping=EarlyStoppingConfig(**rules["early_stopping"]),
        measured=measured,
        mode=run.mode,
        buffer_size=rounds.buffer_size,
        max_staleness=run.max_staleness,
        staleness=rounds.staleness,
        staleness_exponent=rounds.staleness_exponent,
        values=ServerValuesConfig(**rules["values"] | {"accept": run.values}),
        max_step=MAX_STEP if run.max_step is None else run.max_step,
    )


def max_step_of(rules: Mapping[str, Any], mask: Mask) -> float | None:
    """The largest coefficient, under rules as the ledger keeps them; None: no bound but that of float32."""
    step = GuardsConfig(**rules["guards"]).max_step * mask.scale
    return min(step, MAX_STEP) if step > 0 else None


def codec_of(rules: Mapping[str, Any]) -> Codec:
    """How mean displacements are encoded, under rules as the ledger keeps them."""
    return ServerValuesConfig(**rules["values"]).codec


def mode_in_words(settings: RoundSettings) -> str:
    """How a buffered run closes its versions; "" of a synchronous one."""
    if not settings.buffered:
        return ""
    weight = f"1/(1+τ)^{settings.staleness_exponent:g}" if settings.staleness == "polynomial" else "1"
    return (
        f"buffered: {settings.buffer_size} updates close a version, from theta up to {settings.max_staleness} versions "
        f"old; one that is τ versions old weighs {weight}"
    )


def trust_in_words(settings: RoundSettings) -> str:
    """What few updates a round mean, where the run has opted out of comparing them; else ""."""
    if settings.min_updates >= FEWEST_IN_LANE:
        return ""
    return (
        f"rounds.min_updates = {settings.min_updates}: a round may close with fewer than {FEWEST_IN_LANE} updates, and "
        "then one node alone decides where the model goes, up to guards.max_step an update; for nodes that you trust"
    )


def early_stopping_in_words(settings: RoundSettings) -> str:
    """What early stopping does in this run; "" where it is off."""
    config = settings.early_stopping
    if config.by == "off":
        return ""
    if not settings.early_stops:
        return f"by {config.by}: filtering changes nothing at local_steps = {settings.local_steps}"
    again = f", again every {config.every} rounds" if config.every else ""
    return f"by {config.by}, judged in round 0 by {config.calibration_steps} local steps{again}"


def check_same(run: Run, begun: RunDescriptor, rules: Mapping[str, Any], ledger: str) -> None:
    """Refuse to go on with a ledger under other settings than it was begun with.

    Raises:
        RunMismatch: names the key and both values.
    """
    was, now = _flat(begun.model_dump(mode="json")), _flat(run.descriptor.model_dump(mode="json"))
    keys = sorted((was | now).keys() - MAY_CHANGE, key=lambda key: (key in _HASHES, key))
    found = [(_RENAMED.get(key, key), was.get(key), now.get(key)) for key in keys]
    found += [(f"rounds.{key}", rules["rounds"][key], run.rules["rounds"][key]) for key in _FIXED_RULES]
    found += [(f"guards.{key}", rules["guards"][key], run.rules["guards"][key]) for key in _FIXED_GUARDS]
    if begun.values and run.descriptor.values:
        found.append(("values.codec", rules["values"]["codec"], run.rules["values"]["codec"]))
    was, now = rules["early_stopping"], run.rules["early_stopping"]
    if (was["by"], now["by"]) != ("off", "off"):
        found += [(f"early_stopping.{key}", was[key], now[key]) for key in now]
    for key, old, new in found:
        if old != new:
            raise RunMismatch(
                f"{ledger}: {key}",
                f"the run was begun with {old!r}, the configuration says {new!r}",
                "put the old value back, or name another state_dir for a new run",
            )


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
