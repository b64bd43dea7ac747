"""The section `[evaluation]` of `federation.toml`."""

from typing import Annotated

from pydantic import Field

from meerkat_mq.config.section import DataSource, Section


class EvaluationConfig(Section):
    """Evaluation on held-out data, on the server.

    Attributes:
        data: file of rows, or hf:… (docs/tasks.md).
        every: rounds between evaluations.
    """

    data: DataSource
    every: Annotated[int, Field(ge=1)] = 10
    batch_size: Annotated[int, Field(ge=1)] = 64
