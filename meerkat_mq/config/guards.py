"""The section `[guards]` of `federation.toml`."""

from typing import Annotated

from pydantic import Field

from meerkat_mq.config.section import FIXED, Identifier, Section


class GuardsConfig(Section):
    """What makes the server refuse projected gradients (docs/guards.md)."""

    outlier: Annotated[float, Field(gt=1)] = 8.0
    against: Annotated[float, Field(ge=-1, lt=0)] = -0.5
    window: Annotated[int, Field(ge=5, le=1000)] = 50
    trusted: tuple[Identifier, ...] = ()
    max_step: Annotated[float, Field(ge=0), FIXED] = 50.0
