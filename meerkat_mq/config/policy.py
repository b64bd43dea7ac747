"""The section `[policy]` of `node.toml`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from meerkat_mq.config.section import Section

WeightKind = Literal["linear", "embedding", "other"]
Most = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class PolicyConfig(Section):
    """What the owner of a node lets a server ask of it (docs/policy.md)."""

    mask: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None
    kinds: Annotated[list[WeightKind], Field(min_length=1)] = ["linear"]  # noqa: RUF012 - pydantic copies it
    max_weights: Most = 2**22
    max_mask_bytes: Most = 2**26
    tasks: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    max_day_bytes: Most = 2**33
    min_batch: Most = 4
    max_batch: Most = 1024
    max_tokens: Most = 2048
    max_directions: Most = 256
    max_local_steps: Most = 1000
    min_eps: Positive = 1e-6
    max_eps: Positive = 1.0
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    max_lr: Positive = 10.0

    @model_validator(mode="after")
    def _allows_something(self) -> Self:
        for key, least, most in (
            ("eps", self.min_eps, self.max_eps),
            ("lr", self.min_lr, self.max_lr),
            ("batch", self.min_batch, self.max_batch),
        ):
            if least > most:
                raise ValueError(f"min_{key} = {least:g} is more than max_{key} = {most:g}: no run would be allowed")
        return self
