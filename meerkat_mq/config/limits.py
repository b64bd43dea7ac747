"""The section `[limits]` of `node.toml`."""

from typing import Annotated

from pydantic import Field

from meerkat_mq.config.section import Seconds, Section, Share


class LimitsConfig(Section):
    """What a node leaves to others on its machine (docs/duty-cycle.md)."""

    cpu_share: Share = 1.0
    allow: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    check_s: Seconds = 30.0
