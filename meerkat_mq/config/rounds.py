"""The keys of a run's rounds, each declared once: name, bounds, default, meaning.

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
Staleness = Annotated[int, Field(ge=0, le=1000)]


class RunSpec(Closed):
    """What server and nodes must agree on.

    A key that is new on the wire is None by default, and then left out: nodes of an older release refuse what they do
    not know.

    Attributes:
        stream: direction stream.
        count: rounds of the run.
        local_steps: T.
        directions: P, the direction lanes; 1 ≤ P ≤ nodes asked. Default: a lane for every three nodes.
        lr: learning rate.
        eps: perturbation scale.
        perturbations: projected gradients a local step, along as many directions from one point (DeComFL's P).
        batch_size: rows a local step.
        digest_every: theta's digest is computed every so many versions; divides count, so that the last has one.
        mode: "synchronous": a round waits for its nodes; "buffered": it takes what comes, from newer and older theta
            (docs/buffered.md).
        max_staleness: how many versions old the theta of an update may be; 0 in a synchronous run.
    """

    stream: Literal["mk1", "rademacher"] = "mk1"
    count: Count = 100
    local_steps: Annotated[int, Field(ge=1, le=1000)] = 1
    directions: Directions | None = None
    lr: Annotated[float, Field(gt=0)] = 1e-3
    eps: Annotated[float, Field(gt=0)] = 1e-3
    perturbations: Annotated[int, Field(ge=1, le=1000)] = 1
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 16
    digest_every: Annotated[int, Field(ge=1)] = 1
    mode: Literal["synchronous", "buffered"] = "synchronous"
    max_staleness: Staleness = 0

    @property
    def spec(self) -> dict[str, Any]:
        """These keys and their values."""
        return {key: getattr(self, key) for key in RunSpec.model_fields}


class RoundRules(RunSpec):
    """All that rules the rounds: a `RunSpec`, and what the server alone goes by.

    Attributes:
        min_nodes: nodes that must be at hand before a round opens; never fewer than `min_updates`.
        min_updates: usable updates, each of another node, that a round takes at least to close (docs/guards.md). Below
            three nothing can be compared, and one node alone can ruin the model.
        fraction: share of the nodes at hand that a round asks; at least `min_updates` nodes.
        quorum: share of the nodes asked that a round needs.
        deadline_s: a round closes at the latest then, if the quorum is met.
        grace_s: a node counts as dead this long after its death was announced.
        weigh_by_rows: weigh nodes by their number of rows instead of equally.
        aggregate: how a lane's projected gradients become one.
        trim: share of a lane's nodes that "trimmed-mean" leaves out at each end.
        snapshot_every: theta is kept as a file every so many versions, for nodes and servers that come back.
        buffer_size: updates that close a buffered round; at its deadline one suffices.
        staleness: how a buffered run weighs updates from a theta τ versions old: "constant" 1, "polynomial" 1/(1+τ)^a.
        staleness_exponent: a.
    """

    min_nodes: Annotated[int, Field(ge=1, le=65535)] = 1
    min_updates: Annotated[int, Field(ge=1, le=65535)] = 3
    fraction: Share = 1.0
    quorum: Share = 0.5
    deadline_s: Seconds = 60.0
    grace_s: Annotated[float, Field(ge=0, le=86_400)] = 2.0
    weigh_by_rows: Annotated[Flag, FIXED] = False
    aggregate: Annotated[Literal["mean", "trimmed-mean"], FIXED] = "mean"
    trim: Annotated[float, Field(gt=0, lt=0.5), FIXED] = 0.2
    snapshot_every: Annotated[int, Field(ge=1)] = 500
    buffer_size: Annotated[int, Field(ge=1, le=65535)] = 8
    staleness: Annotated[Literal["constant", "polynomial"], FIXED] = "polynomial"
    staleness_exponent: Annotated[float, Field(gt=0, le=10), FIXED] = DEFAULT_EXPONENT


class RoundsConfig(RoundRules, Section):
    """The section `[rounds]` of `federation.toml`: the rules of rounds as a person writes them."""

    max_staleness: Staleness = 20

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
