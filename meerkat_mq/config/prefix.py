"""The section `[prefix]` of `federation.toml` and `node.toml`."""

from typing import Annotated

from pydantic import Field

from meerkat_mq.config.section import Section

Mebibytes = Annotated[int, Field(ge=0, le=1 << 24, strict=True)]


class PrefixConfig(Section):
    """How much may be kept of what the blocks below a mask make of rows (docs/frozen-prefix.md)."""

    memory_mib: Mebibytes = 256
    disk_mib: Mebibytes = 0
