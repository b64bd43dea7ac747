"""A run before it starts: settings, mask and task become a run descriptor and the chunks of its mask."""

import secrets
from dataclasses import dataclass

from meerkat_mq.config import ServerConfig
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.toy import toy_mask
from meerkat_mq.errors import ConfigError, within
from meerkat_mq.model.tasks import load_task
from meerkat_mq.rounds.policy import RoundSettings, default_lanes
from meerkat_mq.wire.arrays import encode_mask, split
from meerkat_mq.wire.descriptor import RunDescriptor, Task
from meerkat_mq.wire.frames import Chunk, Header


@dataclass(frozen=True)
class Run:
    """All that is fixed of a run."""

    descriptor: RunDescriptor
    settings: RoundSettings
    mask: Mask
    blob: bytes

    def chunks(self, term: int) -> list[Chunk]:
        """The mask's chunks as a server of this term publishes them."""
        run_id, name = self.descriptor.run_id, self.mask.hash
        return split(Header.of(run_id, term, 0, name), name, self.blob)


def prepare_run(config: ServerConfig) -> Run:
    """Load what the configuration names and draw the run id.

    Raises:
        ConfigError: mask or task is missing, or more lanes than nodes are asked for.
        MaskError: the mask file cannot be used.
        TaskError: the task is unknown or its file wrong.
    """
    mask = _mask(config)
    run_id = secrets.token_bytes(16)
    rounds = config.rounds
    lanes = rounds.directions or default_lanes(rounds.min_nodes, rounds.fraction)
    settings = RoundSettings(
        run_id=run_id,
        mask_hash=mask.hash,
        count=rounds.count,
        steps=rounds.local_steps,
        lanes=lanes,
        lr=rounds.lr,
        eps=rounds.eps,
        min_nodes=rounds.min_nodes,
        fraction=rounds.fraction,
        quorum=rounds.quorum,
        deadline_s=rounds.deadline_s,
        grace_s=rounds.grace_s,
        weigh_by_rows=rounds.weigh_by_rows,
    )
    blob = encode_mask(mask)
    chunks = split(Header.of(run_id, 0, 0, mask.hash), mask.hash, blob)
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
        batch_size=rounds.batch_size,
        digest_every=rounds.digest_every,
    )
    return Run(descriptor, settings, mask, blob)


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
