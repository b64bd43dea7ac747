"""A run of a world: made of the rules of its rounds and a mask, without any configuration file."""

from functools import lru_cache

from meerkat_mq.config import GuardsConfig, RoundsConfig
from meerkat_mq.core.mask import Mask
from meerkat_mq.ledger.run import Run
from meerkat_mq.rounds.policy import MAX_STEP, RoundSettings
from meerkat_mq.wire.arrays import encode_mask, split
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.messages import Header

FEDERATION = "world"


@lru_cache(16)
def _blob(mask: Mask) -> bytes:
    return encode_mask(mask)


def make_run(settings: RoundSettings, mask: Mask) -> Run:
    """What a server and nodes need of a run, by the rules of its rounds."""
    blob = _blob(mask)
    chunks = split(Header.of(settings.run_id, 0, 0, mask.hash), mask.hash, blob)
    descriptor = RunDescriptor.model_validate(
        {
            "federation": FEDERATION,
            "run": settings.run_id.hex(),
            "engine": "toy",
            "model": "",
            "dtype": "float32",
            "fingerprint": mask.fingerprint.hex(),
            "tokenizer": mask.tokenizer_fingerprint.hex(),
            "mask": mask.hash.hex(),
            "mask_bytes": len(blob),
            "mask_chunks": len(chunks),
            "weights": mask.size,
            **settings.spec,
            "values": settings.values.accept,
            "max_step": settings.max_step if settings.max_step < MAX_STEP else None,
        }
    )
    rules = {
        "rounds": RoundsConfig().model_dump(mode="json"),
        "guards": GuardsConfig().model_dump(mode="json"),
        "early_stopping": settings.early_stopping.model_dump(mode="json"),
        "values": settings.values.model_dump(mode="json"),
    }
    return Run(descriptor, settings, mask, blob, rules)
