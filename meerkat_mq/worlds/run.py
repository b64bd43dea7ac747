"""A run of a world: made of the rules of its rounds and a mask, without any configuration file."""

from functools import lru_cache

from meerkat_mq.config import GuardsConfig, RoundsConfig
from meerkat_mq.core.mask import Mask
from meerkat_mq.ledger.run import Run, mask_keys
from meerkat_mq.rounds.policy import MAX_STEP, RoundSettings
from meerkat_mq.wire.arrays import encode_mask
from meerkat_mq.wire.descriptor import RunDescriptor

FEDERATION = "world"


@lru_cache(16)
def _blob(mask: Mask) -> bytes:
    return encode_mask(mask)


def make_run(settings: RoundSettings, mask: Mask) -> Run:
    """What a server and nodes need of a run, by the rules of its rounds."""
    blob = _blob(mask)
    descriptor = RunDescriptor.model_validate(
        {
            "federation": FEDERATION,
            "run": settings.run_id.hex(),
            "engine": "toy",
            "model": "",
            "dtype": "float32",
            **mask_keys(mask, blob),
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
