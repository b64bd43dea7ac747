"""A run: what is fixed of it, and the rules under which it was begun."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, Final

from meerkat_mq.config import FIXED, Codec, GuardsConfig, RoundRules, Rules, RunSpec, ServerConfig, ServerValuesConfig
from meerkat_mq.core.mask import Mask
from meerkat_mq.errors import RunMismatch
from meerkat_mq.rounds.clipping import FEWEST
from meerkat_mq.rounds.policy import MAX_STEP, RoundSettings
from meerkat_mq.wire.arrays import split
from meerkat_mq.wire.descriptor import MAY_CHANGE, RunDescriptor
from meerkat_mq.wire.frames import Chunk, Header

UNSEEN_AFTER: Final = 10  # rounds without a node that is trusted

_RENAMED = {key: f"rounds.{key}" for key in RunSpec.model_fields} | {
    "weights": "toy_weights", "values": "values.accept",
}  # fmt: skip
_HASHES = {"mask", "fingerprint", "tokenizer"}  # say less than what else differs with them


@dataclass(frozen=True)
class Run:
    """All that is fixed of a run, and the rules of this start, as the ledger keeps those of the first."""

    descriptor: RunDescriptor
    settings: RoundSettings
    mask: Mask
    blob: bytes
    rules: Mapping[str, Any]

    @property
    def codec(self) -> Codec:
        """How mean displacements are encoded."""
        return ServerValuesConfig(**self.rules["values"]).codec

    @property
    def chunks(self) -> list[Chunk]:
        """The mask's chunks; the header of term 0 is replaced by whoever publishes them."""
        run = self.descriptor
        return split(Header.of(run.run_id, 0, 0, run.mask_hash), run.mask_name, self.blob)


def mask_keys(mask: Mask, blob: bytes) -> dict[str, Any]:
    """What a run descriptor says of its mask; `blob` is the mask as it was encoded.

    Raises:
        TooLarge: more than 256 MiB.
    """
    chunks = split(Header.of(bytes(16), 0, 0, mask.hash), mask.hash, blob)
    keys = {"mask": mask.hash, "fingerprint": mask.fingerprint, "tokenizer": mask.tokenizer_fingerprint}
    sizes = {"mask_bytes": len(blob), "mask_chunks": len(chunks), "weights": mask.size}
    return {key: value.hex() for key, value in keys.items()} | sizes


def settings_of(run: RunDescriptor, rules: Mapping[str, Any], *, measured: bool = True) -> RoundSettings:
    """What rules a run's rounds: the descriptor says what is fixed, the rules the rest.

    Args:
        rules: as the ledger keeps them.
        measured: whether the mask's g_p is other than zero; who only reads a ledger need not know.

    Raises:
        ConfigError: the rules do not go together: more lanes than nodes, or more steps than a round takes.
    """
    kept = Rules(**rules)
    return RoundSettings(
        **dict(kept.rounds) | run.spec,
        run_id=run.run_id,
        mask_hash=run.mask_hash,
        guards=kept.guards,
        early_stopping=kept.early_stopping,
        values=kept.values.model_copy(update={"accept": run.values}),
        measured=measured,
        max_step=MAX_STEP if run.max_step is None else run.max_step,
        weights=run.weights,
    )


def max_step_of(rules: Mapping[str, Any], mask: Mask) -> float | None:
    """The largest coefficient, under rules as the ledger keeps them; None: no bound but that of float32."""
    step = GuardsConfig(**rules["guards"]).max_step * mask.scale
    return min(step, MAX_STEP) if step > 0 else None


def as_begun(config: ServerConfig, rules: Mapping[str, Any]) -> ServerConfig:
    """A configuration as a run that was begun with these rules takes it.

    Where it does not name a key whose default is another for new runs, it has the run's. A run with the clipped mean
    keeps its guards too, since `verify` replays them.
    """
    rounds, guards = config.rounds, config.guards
    kept = {"aggregate", "displacement_reach"} - rounds.model_fields_set
    rounds = rounds.model_copy(update={key: rules["rounds"][key] for key in kept})
    if rules["rounds"]["aggregate"] == "clipped-mean":
        guards = GuardsConfig(**rules["guards"]).model_copy(update={"max_step": guards.max_step})
    return config.model_copy(update={"rounds": rounds, "guards": guards})


def kept_guards_in_words(kept: GuardsConfig, asked: GuardsConfig) -> list[str]:
    """Each key of `[guards]` that says something else than the run was begun with, which stays; with a remedy."""
    begun, named = kept.model_dump(mode="json"), asked.model_dump(mode="json")
    return [
        f"guards.{key}: the run was begun with {begun[key]}, and {named[key]} has no effect on it; "
        "put the old value back, or name another state_dir for a new run"
        for key in begun
        if named[key] != begun[key]
    ]


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
    if settings.min_updates >= FEWEST:
        return ""
    return (
        f"rounds.min_updates = {settings.min_updates}: a round may close with fewer than {FEWEST} updates, and "
        "then one node alone decides where the model goes, up to guards.max_step an update; for nodes that you trust"
    )


def unseen_in_words(settings: RoundSettings, seen: Container[str], rounds: int) -> str:
    """What is wrong where no node of a trusted name was seen in so many rounds; "" where all were, or it is early."""
    unseen = [name for name in settings.guards.trusted if name not in seen]
    if not unseen or rounds < UNSEEN_AFTER:
        return ""
    problem = f"guards.trusted names {', '.join(unseen)}, and {rounds:,} rounds have not seen such a node"
    return f"{problem}: start it, or check the spelling; a name is a node's id, and another one needs a new run"


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
    was, now = (_flat(one.model_dump(mode="json", by_alias=False)) for one in (begun, run.descriptor))
    keys = sorted((was | now).keys() - MAY_CHANGE, key=lambda key: (key in _HASHES, key))
    found = [(_RENAMED.get(key, key), was.get(key), now.get(key)) for key in keys]
    for name, section in (("rounds", RoundRules), ("guards", GuardsConfig)):
        fixed = [key for key, field in section.model_fields.items() if FIXED in field.metadata]
        found += [(f"{name}.{key}", rules[name][key], run.rules[name][key]) for key in fixed]
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
