"""The section `[early_stopping]` of `federation.toml`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from meerkat_mq.config.section import Section, Share


class EarlyStoppingConfig(Section):
    """Meerkat-vp: nodes with extremely skewed data do fewer local steps a round (docs/early-stopping.md)."""

    by: Literal["off", "vpcs", "random"] = "off"
    steps: Annotated[int, Field(ge=1, le=1000)] = 1
    calibration_steps: Annotated[int, Field(ge=4, le=1000)] = 200
    every: Annotated[int, Field(ge=0)] = 0
    initial: Annotated[float, Field(gt=0, le=0.5)] = 0.2
    later: Annotated[float, Field(gt=0, le=0.5)] = 0.5
    rho_later: Annotated[float, Field(gt=0)] = 2.5
    rho_quiet: Share = 0.5
    quiet: Annotated[float, Field(gt=0)] = 0.2
    require: Literal["both", "either"] = "both"
    random_share: Share = 0.25

    @field_validator("every")
    @classmethod
    def _not_always(cls, every: int) -> int:
        if every == 1:
            raise ValueError("must be 0, or at least 2: where every round calibrates, nobody does fewer steps")
        return every
