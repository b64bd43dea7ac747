"""The section `[guards]` of `federation.toml`."""

from typing import Annotated

from pydantic import Field

from meerkat_mq.config.section import FIXED, Identifier, Section


class GuardsConfig(Section):
    """What makes the server refuse projected gradients (docs/guards.md)."""

    outlier: Annotated[float, Field(gt=1)] = 8.0
    against: Annotated[float, Field(ge=-1, lt=0)] = -0.5
    takes_back: Annotated[float, Field(ge=0, le=1)] = 0.3
    window: Annotated[int, Field(ge=5, le=1000)] = 50
    trusted: tuple[Identifier, ...] = ()
    max_step: Annotated[float, Field(ge=0), FIXED] = 50.0


class KeptGuards(GuardsConfig):
    """The same as a ledger keeps it: a key that is younger than the ledger means what was the rule before it."""

    takes_back: Annotated[float, Field(ge=0, le=1)] = 0.0
