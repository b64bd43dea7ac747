"""The section `[schedule]` of `node.toml`."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from meerkat_mq.config.section import Section


class ScheduleConfig(Section):
    """When a duty-cycled node is awake (docs/duty-cycle.md)."""

    every_s: Annotated[float, Field(ge=1, le=86_400 * 7)]
    awake_s: Annotated[float, Field(ge=1, le=86_400)] = 60.0

    @model_validator(mode="before")
    @classmethod
    def _awake_all_of_a_short_time(cls, table: object) -> object:
        every_s = table.get("every_s") if isinstance(table, dict) and "awake_s" not in table else None
        short = isinstance(every_s, int | float) and every_s < 60
        return {**table, "awake_s": every_s} if isinstance(table, dict) and short else table

    @model_validator(mode="after")
    def _sleeps(self) -> Self:
        if self.awake_s > self.every_s:
            raise ValueError(f"awake_s = {self.awake_s:g} is more than every_s = {self.every_s:g}")
        return self
