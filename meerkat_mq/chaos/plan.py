"""A drill's plan: which federation, which faults, when; everything random comes from its seed."""

from dataclasses import dataclass
from importlib import resources
from math import ceil
from pathlib import Path
from random import Random
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, model_validator

from meerkat_mq.chaos.faults import FAULTS, Fault
from meerkat_mq.chaos.stage import BROKER, SERVER
from meerkat_mq.config import (
    BrokerConfig,
    GuardsConfig,
    Identifier,
    LocalPath,
    NodeConfig,
    RoundsConfig,
    Seconds,
    Section,
    ServerConfig,
    check_config,
    load_config,
)
from meerkat_mq.errors import ConfigError

FEDERATION = "drill"
REST_S = 1.0  # what one fault struck is left alone for so long before the next
SPARE_ROUNDS = 20
LINK = "link:"
NODES = "nodes"

_PLANS = resources.files("meerkat_mq.chaos") / "plans"
_ROUNDS = {"lr": 0.05, "batch_size": 4, "deadline_s": 1.0, "grace_s": 0.5, "snapshot_every": 100}


class FederationPlan(Section):
    """A federation that the drill starts: broker, server and nodes.

    Attributes:
        nodes: how many, with the toy engine.
        weights: of the toy engine's theta.
        rounds: keys of `[rounds]` in federation.toml. Without `count`, as many as last until all faults have healed.
        guards: keys of `[guards]`.
        pace_s: each link takes so much longer, each way, until all faults have healed, so that rounds last about four
            times that.
        config: a federation.toml, in place of the toy engine; its broker and state_dir are replaced.
        node_configs: its node.toml files, treated likewise.
    """

    nodes: Annotated[int, Field(ge=2, le=64)] = 8
    weights: Annotated[int, Field(ge=1, le=10_000_000)] = 1000
    rounds: dict[str, Any] = Field(default_factory=dict)
    guards: GuardsConfig = GuardsConfig()
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
    at: tuple[Annotated[float, Field(ge=0)], ...] | Annotated[float, Field(ge=0)] | None = None
    every: Seconds | None = None
    between: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]] | None = None
    for_s: Seconds = 3.0

    @model_validator(mode="after")
    def _when(self) -> Self:
        if (self.at is None) == (self.every is None and self.between is None):
            raise ValueError("needs either at, or every, or between (every may have between)")
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


@dataclass(frozen=True)
class Strike:
    """One fault at one time.

    Attributes:
        at: seconds from the beginning.
        target: name of the process whose link or self is struck; "broker".
        shown: the target for people.
        random: seed of its own chance.
    """

    at: float
    fault: Fault
    target: str
    for_s: float
    random: str

    @property
    def shown(self) -> str:
        """The target for people."""
        return f"{LINK}{self.target}" if self.fault.on == "link" else self.target


@dataclass(frozen=True)
class Plan:
    """A plan that was checked.

    Attributes:
        name: for people.
        file: what the plan file says.
        strikes: by time.
        server: the federation's configuration; None where it is attached.
        nodes: likewise, by id; of an attached federation the ids.
    """

    name: str
    file: PlanFile
    strikes: tuple[Strike, ...]
    server: ServerConfig | None
    nodes: dict[str, NodeConfig | None]


def shipped() -> list[str]:
    """Names of the plans that come with the package."""
    return sorted(entry.name.removesuffix(".toml") for entry in _PLANS.iterdir() if entry.name.endswith(".toml"))


def load_plan(name: str, *, out: Path, seconds: float | None = None) -> Plan:
    """Read and check a plan, and draw its schedule.

    Args:
        name: path of a TOML file, or a shipped plan's name.
        out: folder for everything that the drill leaves.
        seconds: the drill lasts so long instead of `duration_s`; moments scale with it, what heals a fault does not.

    Raises:
        ConfigError: names the file and the key.
    """
    path = Path(name)
    if path.suffix != ".toml":
        if name not in shipped():
            raise ConfigError(
                f"plan {name}", "is neither a .toml file nor a plan", f"name one of {', '.join(shipped())}"
            )
        path = Path(str(_PLANS / f"{name}.toml"))
    file = _scaled(load_config(path, PlanFile), seconds)
    folder = path.resolve().parent
    nodes = _node_names(file, folder)
    strikes = _schedule(file, [_checked(file, number, nodes, path) for number in range(len(file.faults))], list(nodes))
    if file.attach is not None:
        return Plan(path.stem, file, strikes, None, dict.fromkeys(nodes))
    server = _server(file, strikes, len(nodes), path, out)
    configs = {
        node: config.model_copy(update={"state_dir": out / node, "exit_when_finished": False})
        if config is not None
        else NodeConfig(id=node, federation=FEDERATION, data=out / f"{node}.jsonl", state_dir=out / node)
        for node, config in nodes.items()
    }
    return Plan(path.stem, file, strikes, server, dict(configs))


def _scaled(file: PlanFile, seconds: float | None) -> PlanFile:
    if seconds is None:
        return file
    factor = seconds / file.duration_s

    def scale(fault: FaultPlan) -> FaultPlan:
        at, between = fault.at, fault.between
        return fault.model_copy(
            update={
                "at": tuple(factor * moment for moment in at) if isinstance(at, tuple) else at and factor * at,
                "between": between and (factor * between[0], factor * between[1]),
            }
        )

    return file.model_copy(update={"duration_s": seconds, "faults": tuple(map(scale, file.faults))})


def _node_names(file: PlanFile, folder: Path) -> dict[str, NodeConfig | None]:
    if file.attach is not None:
        return dict.fromkeys(file.attach.nodes)
    if file.federation.config is None:
        return {f"node-{number}": None for number in range(file.federation.nodes)}
    configs = [load_config(folder / path, NodeConfig) for path in file.federation.node_configs]
    return {config.id: config for config in configs}


def _server(
    file: PlanFile, strikes: tuple[Strike, ...], nodes: int, path: Path, out: Path
) -> ServerConfig:  # fmt: skip
    plan = file.federation
    if plan.config is not None:
        config = load_config(plan.config, ServerConfig)
        return config.model_copy(update={"state_dir": out / SERVER, "once": False})
    table = {**_ROUNDS, "min_nodes": max(1, nodes // 2), **plan.rounds}
    if "count" not in table:
        lasts = max([file.duration_s, *(strike.at + strike.for_s for strike in strikes)])
        table["count"] = ceil(lasts / (4 * max(plan.pace_s, 0.005))) + SPARE_ROUNDS
    rounds = check_config(table, RoundsConfig, where=f"{path}: federation.rounds")
    return ServerConfig(
        federation=FEDERATION,
        state_dir=out / SERVER,
        rounds=rounds,
        guards=plan.guards,
        engine="toy",
        toy_weights=plan.weights,
    )


def _checked(file: PlanFile, number: int, nodes: dict[str, NodeConfig | None], path: Path) -> tuple[Fault, str]:
    """The fault of an entry with its parameters, and its target."""
    entry = file.faults[number]
    where = f"{path}: faults.{number}"
    kind = FAULTS.get(entry.fault)
    if kind is None:
        raise ConfigError(f"{where}.fault", f"{entry.fault!r} is unknown", f"name one of {', '.join(FAULTS)}")
    fault = check_config(entry.model_extra or {}, kind, where=where)
    legal = {
        "broker": [BROKER],
        "server": [SERVER],
        "node": [NODES, *nodes],
        "process": [NODES, SERVER, *nodes],
        "link": [f"{LINK}{name}" for name in (NODES, SERVER, *nodes)],
    }[kind.on]
    target = entry.target or legal[0]
    if target not in legal:
        shown = ", ".join(legal[:4]) + (", …" if len(legal) > 4 else "")
        raise ConfigError(
            f"{where}.target", f"{target!r} is nothing that {entry.fault} strikes", f"name one of {shown}"
        )
    if file.attach is not None:
        _check_attached(file.attach, fault, target.removeprefix(LINK), where)
    return fault, target.removeprefix(LINK)


def _check_attached(attach: AttachPlan, fault: Fault, target: str, where: str) -> None:
    if fault.starts:
        raise ConfigError(f"{where}.fault", f"{fault.name!r} starts processes", "leave it out with attach")
    table = {SERVER: attach.server, **attach.nodes}
    key = "proxy_port" if fault.on in ("link", "node") else "pid"
    for name in attach.nodes if target == NODES else [target]:
        if getattr(table[name], key) is None:
            raise ConfigError(f"{where}.target", f"attach names no {key} of {name}", f"add {key}, or strike another")
    if attach.broker.tls and key == "proxy_port":
        raise ConfigError("attach.broker.url", "is encrypted, which no proxy can treat", "leave link faults out")


# --- the schedule ---


def _schedule(file: PlanFile, faults: list[tuple[Fault, str]], nodes: list[str]) -> tuple[Strike, ...]:
    """Draw when and whom; whatever is struck already, or one node too many at a time, waits."""
    wanted = sorted(
        (moment, number, turn)
        for number, entry in enumerate(file.faults)
        for turn, moment in enumerate(_moments(entry, file.duration_s, _chance(file, number)))
    )
    placed = list[Strike]()
    for moment, number, turn in wanted:
        fault, target = faults[number]
        for_s, random = file.faults[number].for_s, _chance(file, number, turn)
        candidates = random.sample(nodes, len(nodes)) if target == NODES else [target]
        at, chosen = moment, None
        while chosen is None:
            chosen = next((name for name in candidates if _free(placed, name, at, at + for_s, len(nodes))), None)
            at += 0.0 if chosen else 0.25
        placed.append(Strike(at, fault, chosen, for_s, f"{file.seed} {number} {turn} strike"))
    return tuple(sorted(placed, key=lambda strike: strike.at))


def _chance(file: PlanFile, *place: int) -> Random:
    return Random(" ".join(map(str, (file.seed, *place))))  # noqa: S311 - a schedule that can be repeated


def _moments(entry: FaultPlan, duration_s: float, random: Random) -> list[float]:
    if entry.at is not None:
        return sorted(entry.at) if isinstance(entry.at, tuple) else [entry.at]
    first, last = entry.between or (0.0, duration_s)
    every = min(entry.every or last - first, last - first)
    return [first + every * (turn + random.random()) for turn in range(int((last - first) / every + 1e-9))]


def is_core(target: str) -> bool:
    """Whether everybody depends on it."""
    return target in (BROKER, SERVER)


def _free(placed: list[Strike], target: str, begin: float, end: float, nodes: int) -> bool:
    """Whether a target can be struck then: the core once at a time, a node once, a third of the nodes at once."""
    meanwhile = [
        strike.target for strike in placed if strike.at < end + REST_S and begin < strike.at + strike.for_s + REST_S
    ]
    if is_core(target):
        return not any(map(is_core, meanwhile))
    struck = [name for name in meanwhile if not is_core(name)]
    return target not in struck and len(set(struck)) < max(1, nodes // 3)
