"""The section `[guards]` of `federation.toml`."""

from typing import Annotated

from pydantic import Field

from meerkat_mq.config.section import FIXED, Section


class GuardsConfig(Section):
    """What makes the server refuse projected gradients (docs/guards.md).

    Attributes:
        outlier: robust z-score above which one is refused, unless the node's own past excuses it: against the lane's
            nodes of the round where there are three, else against the magnitudes in all lanes.
        against: correlation with the median of the lane's others, over the window, below which a node counts as working
            against them, and is refused; -1: never. Needs ten rounds.
        window: rounds of past that a node is judged by.
        max_step: how far one projected gradient, or one local step of a displacement, may move the weights: lr·|g|, or
            the root mean square, in multiples of that of theta_0's weights; 0: no bound but that of float32. It holds
            from the first update on, and is fixed for a run.
    """

    outlier: Annotated[float, Field(gt=1)] = 8.0
    against: Annotated[float, Field(ge=-1, lt=0)] = -0.5
    window: Annotated[int, Field(ge=5, le=1000)] = 20
    max_step: Annotated[float, Field(ge=0), FIXED] = 50.0
