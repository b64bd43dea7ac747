"""What a plan file may say."""

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from meerkat_mq.config import BrokerConfig, EarlyStoppingConfig, GuardsConfig, Identifier, LocalPath, Seconds, Section


class FederationPlan(Section):
    """A federation that the drill starts: broker, server and nodes.

    Attributes:
        nodes: how many, with the toy engine.
        weights: of the toy engine's theta.
        rounds: keys of `[rounds]` in federation.toml. Without `count`, as many as last until all faults have healed.
        guards: keys of `[guards]`.
        early_stopping: keys of `[early_stopping]`.
        pace_s: each link takes so much longer, each way, until all faults have healed, so that rounds last about four
            times that.
        config: a federation.toml, in place of the toy engine; its broker and state_dir are replaced.
        node_configs: its node.toml files, treated likewise.
    """

    nodes: Annotated[int, Field(ge=2, le=64)] = 8
    weights: Annotated[int, Field(ge=1, le=10_000_000)] = 1000
    rounds: dict[str, Any] = Field(default_factory=dict)
    guards: GuardsConfig = GuardsConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    pace_s: Annotated[float, Field(ge=0, le=60)] = 0.05
    config: LocalPath | None = None
    node_configs: tuple[LocalPath, ...] = ()

    @model_validator(mode="after")
    def _server_and_nodes(self) -> Self:
        if (self.config is None) != (not self.node_configs):
            raise ValueError("config and node_configs go together")
        return self


class AttachedProcess(Section):
    """A process that runs already.

    Attributes:
        pid: for signals, on this machine.
        proxy_port: the drill's proxy listens here, on 127.0.0.1, for faults of the link; the process must have it as
            its broker.
    """

    pid: Annotated[int, Field(ge=2)] | None = None
    proxy_port: Annotated[int, Field(ge=1, le=65535)] | None = None


class AttachPlan(Section):
    """A federation that runs already.

    Attributes:
        state_dir: the server's, whose ledger is read at the end.
        broker: the way to its broker, without a proxy.
    """

    federation: Identifier
    state_dir: LocalPath
    broker: BrokerConfig
    server: AttachedProcess = AttachedProcess()
    nodes: Annotated[dict[Identifier, AttachedProcess], Field(min_length=1)]


def _several(at: object) -> object:
    return at if isinstance(at, list | tuple) else (at,)


class FaultPlan(Section):
    """A fault and its schedule; other keys are the fault's own.

    Attributes:
        fault: its name in the registry.
        target: "broker", "server", a node, "nodes" (one by chance each time); of link faults "link:server",
            "link:<node>" or "link:nodes". Default: by chance a node, where the fault strikes processes or links.
        at: seconds from the beginning: one moment or several.
        every: once in so many seconds, by chance when.
        between: first and last second; default: the whole drill.
        for_s: so long until it heals.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    fault: str
    target: str | None = None
    at: Annotated[tuple[Annotated[float, Field(ge=0)], ...], BeforeValidator(_several)] | None = None
    every: Seconds | None = None
    between: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]] | None = None
    for_s: Seconds = 3.0

    @model_validator(mode="after")
    def _when(self) -> Self:
        if (self.at is None) == (self.every is None and self.between is None):
            raise ValueError("needs either at, or every, or between (every may have between)")
        if self.at == ():
            raise ValueError("at must name a moment")
        if self.between is not None and self.between[0] >= self.between[1]:
            raise ValueError("between must name two moments, the earlier first")
        return self


class PlanFile(Section):
    """plan.toml.

    Attributes:
        seed: of everything random.
        duration_s: faults strike within this time.
        recover_s: after a fault has healed, the next round closes within this time, or it is a violation.
        return_s: after all have healed, every node takes part again within this time.
    """

    seed: Annotated[int, Field(ge=0)] = 0
    duration_s: Seconds = 120.0
    recover_s: Seconds = 20.0
    return_s: Seconds = 90.0
    federation: FederationPlan = FederationPlan()
    attach: AttachPlan | None = None
    faults: Annotated[tuple[FaultPlan, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _within_the_duration(self) -> Self:
        for number, fault in enumerate(self.faults):
            for key, moments in (("at", fault.at), ("between", fault.between)):
                if moments and max(moments) > self.duration_s:
                    late = f"faults.{number}.{key} names {max(moments):g} s"
                    raise ValueError(f"{late}, which is after duration_s = {self.duration_s:g}")
        return self
