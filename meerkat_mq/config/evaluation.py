"""The section `[evaluation]` of `federation.toml`."""

from typing import Annotated

from pydantic import Field

from meerkat_mq.config.section import DataSource, Section


class EvaluationConfig(Section):
    """Evaluation on held-out data, on the server."""

    data: DataSource
    every: Annotated[int, Field(ge=1)] = 10
    batch_size: Annotated[int, Field(ge=1)] = 64
