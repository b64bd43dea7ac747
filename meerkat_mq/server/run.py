"""A run before it starts: settings, mask and task become a run descriptor and the chunks of its mask."""

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from meerkat_mq.config import Codec, EarlyStoppingConfig, GuardsConfig, RoundsConfig, ServerConfig, ServerValuesConfig
from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.errors import ConfigError, RunMismatch, within
from meerkat_mq.rounds.guards import FEWEST_IN_LANE
from meerkat_mq.rounds.policy import MAX_STEP, RoundSettings, default_lanes
from meerkat_mq.tasks.load import load_task
from meerkat_mq.wire.arrays import encode_mask, split
from meerkat_mq.wire.descriptor import RunDescriptor, Task
from meerkat_mq.wire.frames import Chunk, Header

_MAY_DIFFER = {
    "mask_bytes",
    "mask_chunks",
    "model",
    "max_step",
}  # how a mask is compressed and where a model lies; hashes say what
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
        run_id, name = self.descriptor.run_id, self.mask.hash
        return split(Header.of(run_id, term, 0, name), name, self.blob)


def prepare_run(config: ServerConfig, begun: RunDescriptor | None = None) -> Run:
    """Load what the configuration names; draw a run id, unless the ledger describes a run already.

    Raises:
        ConfigError: mask or task is missing, more lanes than nodes are asked for, or more steps than a round takes.
        MaskError: the mask file cannot be used.
        TaskError: the task is unknown or its file wrong.
    """
    mask = _mask(config)
    rounds = config.rounds
    run_id = begun.run_id if begun else secrets.token_bytes(16)
    by_default = begun.directions if begun else default_lanes(rounds.min_nodes, rounds.fraction)
    lanes = rounds.directions or by_default
    blob = encode_mask(mask)
    chunks = split(Header.of(run_id, 0, 0, mask.hash), mask.hash, blob)
    sections = {
        "rounds": rounds, "guards": config.guards, "early_stopping": config.early_stopping, "values": config.values,
    }  # fmt: skip
    rules = {name: section.model_dump(mode="json") for name, section in sections.items()}
    bounded = begun is None or begun.max_step is not None  # a run that is older than the bound goes on without
    with _in_words():
        descriptor = RunDescriptor(
            federation=config.federation,
            run=run_id.hex(),
            engine=config.engine,
            model=config.model.source if config.model else "",
            task=_task(config),
            dtype=config.dtype,
            fingerprint=mask.fingerprint.hex(),
            tokenizer=mask.tokenizer_fingerprint.hex(),
            mask=mask.hash.hex(),
            mask_bytes=len(blob),
            mask_chunks=len(chunks),
            weights=mask.size,
            stream=rounds.stream,
            rounds=rounds.count,
            local_steps=rounds.local_steps,
            directions=lanes,
            lr=rounds.lr,
            eps=rounds.eps,
            perturbations=rounds.perturbations,
            batch_size=rounds.batch_size,
            digest_every=rounds.digest_every,
            mode=rounds.mode,
            max_staleness=rounds.max_staleness if rounds.mode == "buffered" else 0,
            values=config.values.accept,
            max_step=max_step_of(rules, mask) if bounded else None,
        )
    return Run(descriptor, settings_of(descriptor, rules, measured=bool(mask.g_p.any())), mask, blob, rules)


@contextmanager
def _in_words() -> Iterator[None]:
    """Make a ConfigError of what a descriptor does not take: each key is right, but not all together."""
    try:
        yield
    except ValidationError as error:
        problem = str(error.errors(include_url=False)[0]["msg"]).removeprefix("Value error, ")
        raise ConfigError("rounds", problem, "lower one of them") from error


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
        steps=run.local_steps,
        lanes=run.directions,
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
        values_accepted=run.values,
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
        return f"by {config.by}: filtering changes nothing at local_steps = {settings.steps}"
    again = f", again every {config.every} rounds" if config.every else ""
    return f"by {config.by}, judged in round 0 by {config.calibration_steps} local steps{again}"


def check_same(run: Run, begun: RunDescriptor, rules: Mapping[str, Any], ledger: str) -> None:
    """Refuse to go on with a ledger under other settings than it was begun with.

    Raises:
        RunMismatch: names the key and both values.
    """
    was, now = _flat(begun.model_dump(mode="json")), _flat(run.descriptor.model_dump(mode="json"))
    keys = sorted((was | now).keys() - _MAY_DIFFER, key=lambda key: (key in _HASHES, key))
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


def _mask(config: ServerConfig) -> Mask:
    if config.engine == "toy":
        return toy_mask(config.toy_weights)
    if config.mask is None:
        raise ConfigError("mask", "is missing", "name a mask file; `meerkat mask` writes one")
    with within("mask"):
        return Mask.load(config.mask)


def _task(config: ServerConfig) -> Task | None:
    if config.engine == "toy":
        return None
    if config.task is None:
        raise ConfigError("task", "is missing", "name a built-in task or a task's TOML file; see docs/tasks.md")
    with within("task"):
        return load_task(config.task)
