"""The section `[values]`, of `federation.toml` and of `node.toml`."""

from typing import Annotated, Literal

from pydantic import Field

from meerkat_mq.config.section import Codec, Flag, Section


class ServerValuesConfig(Section):
    """Values nodes, as the server treats them (docs/values.md).

    Attributes:
        accept: whether nodes may send displacements instead of projected gradients; these cannot be replayed.
        codec: how the mean displacement is encoded for everybody.
    """

    accept: Flag = False
    codec: Codec = "bfloat16"


class NodeValuesConfig(Section):
    """What a values node does and sends (docs/values.md).

    Attributes:
        optimiser: of the local steps on the masked weights; its state does not outlive a round.
        lr: its learning rate; not the run's, which is that of projected gradients.
        codec: how the displacement is encoded; what an encoding leaves out is added to the next one (error feedback).
    """

    optimiser: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    codec: Codec = "int8"
