"""The section `[values]`, of `federation.toml` and of `node.toml`."""

from typing import Annotated, Literal

from pydantic import Field

from meerkat_mq.config.section import Codec, Flag, Section


class ServerValuesConfig(Section):
    """Values nodes, as the server treats them (docs/values.md)."""

    accept: Flag = False
    codec: Codec = "bfloat16"


class NodeValuesConfig(Section):
    """What a values node does and sends (docs/values.md)."""

    optimiser: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    codec: Codec = "int8"
