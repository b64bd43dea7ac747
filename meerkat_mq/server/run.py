"""A run before it starts: settings, mask and task become a run descriptor and the chunks of its mask."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from pydantic import ValidationError

from meerkat_mq.config import ServerConfig
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import Coefficient, Displacement, Entry, short_hash
from meerkat_mq.engines.registry import completion_of, entry_of, own_mask, runs_of
from meerkat_mq.errors import ConfigError, within
from meerkat_mq.ledger.run import Run, mask_keys, max_step_of, settings_of
from meerkat_mq.rounds.policy import default_lanes
from meerkat_mq.tasks.load import load_task
from meerkat_mq.tasks.task import Task
from meerkat_mq.wire.arrays import encode_mask
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.frames import encode
from meerkat_mq.wire.limits import LONGEST_ID, largest_frame, packet_bytes
from meerkat_mq.wire.messages import Entries, Header, Round, Update
from meerkat_mq.wire.topics import Topics


def prepare_run(config: ServerConfig, begun: RunDescriptor | None = None) -> Run:
    """Load what the configuration names; draw a run id, unless the ledger describes a run already.

    Raises:
        ConfigError: mask or task is missing, more lanes than nodes are asked for, or more steps than a round takes.
        MaskError: the mask file cannot be used.
        TaskError: the task is unknown or its file wrong.
        MissingExtra, ModelError: the task is of completions, and the model's tokenizer cannot be read.
    """
    mask = _mask(config)
    rounds = config.rounds
    run_id = begun.run_id if begun else secrets.token_bytes(16)
    by_default = begun.directions if begun else default_lanes(rounds.min_nodes, rounds.fraction)
    spec = rounds.spec | {"directions": rounds.directions or by_default}
    blob = encode_mask(mask)
    rules = config.kept
    as_begun = begun is None or begun.mask_bytes == len(blob)  # not where another zstd made the chunks that nodes hold
    bounded = begun is None or begun.max_step is not None  # a run that is older than the bound goes on without
    task = _task(config)
    with _in_words():
        descriptor = RunDescriptor(
            federation=config.federation,
            run=run_id.hex(),
            engine=runs_of(config.engine),
            model=config.model.source if config.model else "",
            task=None if task is None else task.describe(),
            dtype=config.dtype,
            mask_blob=None if as_begun else short_hash(blob).hex(),
            **mask_keys(mask, blob),
            **spec,
            values=config.values.accept,
            max_step=max_step_of(rules, mask) if bounded else None,
            completion=begun.completion if begun else _completion(config, task),
        )
    settings = settings_of(descriptor, rules, measured=bool(mask.g_p.any()))
    room = largest_frame(config.broker.max_packet_bytes, Topics(config.federation))
    return Run(descriptor, settings.model_copy(update={"frame_bytes": room}), mask, blob, rules)


@contextmanager
def _in_words() -> Iterator[None]:
    """Make a ConfigError of what a descriptor does not take: each key is right, but not all together."""
    try:
        yield
    except ValidationError as error:
        problem = str(error.errors(include_url=False)[0]["msg"]).removeprefix("Value error, ")
        raise ConfigError("rounds", problem, "lower one of them") from error


def _mask(config: ServerConfig) -> Mask:
    if config.mask is not None and entry_of(config.engine).mask is None:
        with within("mask"):
            return Mask.load(config.mask)
    mask = own_mask(config.engine, config.toy_weights)
    if mask is None:
        raise ConfigError("mask", "is missing", "name a mask file; `meerkat mask` writes one")
    return mask


def _task(config: ServerConfig) -> Task | None:
    wanted = entry_of(config.engine).task
    if wanted == "none" or (wanted == "optional" and config.task is None):
        return None
    if config.task is None:
        raise ConfigError("task", "is missing", "name a built-in task or a task's TOML file; see docs/tasks.md")
    with within("task"):
        return load_task(config.task)


def _completion(config: ServerConfig, task: Task | None) -> str | None:
    model = None if config.model is None else config.model.source
    with within("model.source") if model is not None else nullcontext():
        found = None if task is None else completion_of(config.engine, model, task)
    return None if found is None else found.hex()


def check_room(config: ServerConfig, run: Run) -> None:
    """Make sure that packets hold the largest of each kind of message; else ConfigError: `broker.max_packet_bytes`."""
    limit = config.broker.max_packet_bytes
    for what, topic, payload in _needed(run, Topics(config.federation)):
        size = packet_bytes(topic, payload, 1)
        if size > limit:
            problem = f"is {limit}, and {what} makes a packet of {size} bytes"
            raise ConfigError(
                "broker.max_packet_bytes", problem, f"set it to {size} or more, and the broker's limit too"
            )


def _needed(run: Run, topics: Topics) -> Iterator[tuple[str, str, bytes]]:
    """What a packet must hold, its topic and its payload."""
    settings, header, first = run.settings, Header.of(bytes(16), 0, 0, bytes(8)), run.chunks[0]
    yield "the run's description", topics.run, run.descriptor.encode()
    yield "a part of the mask", topics.blob(first.blob, first.index), encode(first)
    slots = frozenset(range(settings.fewest_nodes))
    short = tuple((slot, 1) for slot in sorted(slots)) if settings.early_stops else ()
    asked = Round(header, True, settings.most_steps, settings.directions, 1.0, 0, asked=slots, short=short)
    yield f"a round of {len(slots)} nodes", topics.round, encode(asked)
    scalars = settings.most_steps * settings.perturbations
    seeds = (0,) * scalars if settings.buffered else None  # a node may send such an update after a restart
    update = Update(header, 0, bytes(8), 0.0, (0.0,) * scalars, seeds)
    yield "an update of a node", topics.up(LONGEST_ID, "update"), encode(update)
    terms = (Coefficient(0, 0, 0.0, min(1, settings.max_staleness)),) * (
        settings.directions * scalars * (settings.max_staleness + 1)
    )
    added = Displacement(bytes(16), 1) if settings.values.accept else None
    entries = Entries(header, (Entry(1, terms, bytes(16), bytes(16), added),))
    yield "a round's entry", topics.reply(LONGEST_ID), encode(entries)
