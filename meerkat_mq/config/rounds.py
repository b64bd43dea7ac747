"""The keys of a run's rounds, each declared once: name, bounds, default; docs/configuration.md has their meaning.

All that has a key of rounds inherits it from here: `RoundsConfig` is the section `[rounds]` of `federation.toml`, the
run's descriptor on the wire (wire/descriptor.py) is a `RunSpec`, and what the machines go by (rounds/policy.py) are
`RoundRules`. Where a key is declared says who knows it and whether it may change while a run lasts:

- `RunSpec`: nodes must know it too. The descriptor carries it, and it is fixed for a run.
- `RoundRules`, `FIXED`: the server's alone. The ledger keeps it with the rules of the first start, and it is fixed.
- `RoundRules`, without: the server's alone, and a server that resumes the run may have another value.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from meerkat_mq.config.section import FIXED, Closed, Flag, Seconds, Section, Share

DEFAULT_EXPONENT = 0.5

Count = Annotated[int, Field(ge=1, lt=2**32)]
Directions = Annotated[int, Field(ge=1, le=4096)]
Aggregate = Literal["clipped-mean", "mean", "trimmed-mean"]
Reach = Annotated[float, Field(gt=0)]
Staleness = Annotated[int, Field(ge=0, le=1000)]


class RunSpec(Closed):
    """What server and nodes must agree on.

    A key that is new on the wire is None by default, and then left out: nodes of an older release refuse what they do
    not know.
    """

    stream: Literal["mk1", "rademacher"] = "mk1"
    count: Count = 100
    local_steps: Annotated[int, Field(ge=1, le=1000)] = 1  # T
    directions: Directions | None = None  # P, the lanes; None: one for every three nodes
    lr: Annotated[float, Field(gt=0)] = 1e-3
    eps: Annotated[float, Field(gt=0)] = 1e-3
    perturbations: Annotated[int, Field(ge=1, le=1000)] = 1  # K, projected gradients a local step (DeComFL's P)
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 16
    digest_every: Annotated[int, Field(ge=1)] = 1  # divides count, so that the last version has one
    mode: Literal["synchronous", "buffered"] = "synchronous"
    max_staleness: Staleness = 0  # 0 in a synchronous run

    @property
    def spec(self) -> dict[str, Any]:
        """These keys and their values."""
        return {key: getattr(self, key) for key in RunSpec.model_fields}


class RoundRules(RunSpec):
    """All that rules the rounds: a `RunSpec`, and what the server alone goes by."""

    min_nodes: Annotated[int, Field(ge=1, le=65535)] = 1
    min_updates: Annotated[int, Field(ge=1, le=65535)] = 3
    fraction: Share = 1.0
    quorum: Share = 0.5
    deadline_s: Seconds = 60.0
    grace_s: Annotated[float, Field(ge=0, le=86_400)] = 2.0
    weigh_by_rows: Annotated[Flag, FIXED] = False
    aggregate: Annotated[Aggregate, FIXED] = "mean"
    trim: Annotated[float, Field(gt=0, lt=0.5), FIXED] = 0.2
    displacement_reach: Annotated[Reach | None, FIXED] = None  # None: of a run that is older than the key
    snapshot_every: Annotated[int, Field(ge=1)] = 500
    buffer_size: Annotated[int, Field(ge=1, le=65535)] = 8
    staleness: Annotated[Literal["constant", "polynomial"], FIXED] = "polynomial"
    staleness_exponent: Annotated[float, Field(gt=0, le=10), FIXED] = DEFAULT_EXPONENT


class RoundsConfig(RoundRules, Section):
    """The section `[rounds]` of `federation.toml`: the rules of rounds as a person writes them."""

    max_staleness: Staleness = 20
    aggregate: Annotated[Aggregate, FIXED] = "clipped-mean"
    displacement_reach: Annotated[Reach | None, FIXED] = 0.25

    @property
    def spec(self) -> dict[str, Any]:
        """As a run has it: no update of a synchronous one is stale."""
        return super().spec | ({} if self.mode == "buffered" else {"max_staleness": 0})

    @model_validator(mode="after")
    def _buffered_rules_in_a_buffered_run(self) -> Self:
        if self.mode == "synchronous":
            for key in ("buffer_size", "max_staleness", "staleness", "staleness_exponent"):
                if key in self.model_fields_set and getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f'{key} does nothing in a synchronous run: set mode = "buffered"')
        elif self.staleness == "constant" and self.staleness_exponent != DEFAULT_EXPONENT:
            raise ValueError('staleness_exponent does nothing with staleness = "constant": remove one of the two')
        elif self.fraction < 1:
            raise ValueError("fraction is for synchronous rounds: a buffered one asks every node at hand")
        return self

    @model_validator(mode="after")
    def _last_version_has_a_digest(self) -> Self:
        if self.count % self.digest_every:
            raise ValueError(f"digest_every = {self.digest_every} must divide count = {self.count}")
        return self


class KeptRounds(RoundsConfig):
    """The same as a ledger keeps it: a key that is younger than the ledger means what was the rule before it."""

    displacement_reach: Annotated[Reach | None, FIXED] = None
