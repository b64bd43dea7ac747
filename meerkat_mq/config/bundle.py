"""The section `[bundle]` of `node.toml`."""

from typing import Annotated

from pydantic import Field

from meerkat_mq.config.section import Seconds, Section


class BundleConfig(Section):
    """Where a node fetches its bundle from, and within which bounds (docs/onnx.md)."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s@?#]+$", max_length=2000)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    max_mib: Annotated[int, Field(ge=1, le=1 << 20)] = 4096
    timeout_s: Seconds = 3600.0
