"""A drill's plan: which federation, which faults, when; everything random comes from its seed."""

from dataclasses import dataclass
from importlib import resources
from math import ceil
from pathlib import Path
from random import Random
from typing import Literal

from meerkat_mq.chaos.faults import FAULTS, Fault
from meerkat_mq.chaos.plan_file import AttachPlan, FaultPlan, PlanFile
from meerkat_mq.chaos.stage import BROKER, SERVER
from meerkat_mq.config import NodeConfig, RoundsConfig, ServerConfig, check_config, load_config
from meerkat_mq.errors import ConfigError

FEDERATION = "drill"
REST_S = 1.0  # what one fault struck is left alone for so long before the next
SPARE_ROUNDS = 20
SHORTEST_S, LONGEST_S = 5.0, 604_800.0
LINK = "link:"
NODES = "nodes"

_PLANS = resources.files("meerkat_mq.chaos") / "plans"
_EARLIER = (1.0, 0.75, 0.5, 0.25, 0.0)  # drawn moments come so much earlier until all faults fit
_BUFFERED = {"mode": "buffered", "max_staleness": 8}  # and a buffer of half the nodes
_ROUNDS = {
    "lr": 0.05, "batch_size": 4, "deadline_s": 1.0, "grace_s": 0.5, "snapshot_every": 100,
    "min_updates": 1,  # its nodes are its own, and faults leave few of them
}  # fmt: skip


@dataclass(frozen=True)
class Strike:
    """One fault at one time, in seconds from the beginning.

    Attributes:
        target: name of the process whose link or self is struck; "broker".
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
    """A plan that was checked; strikes are by time.

    Attributes:
        server: the federation's configuration; None where it is attached.
        nodes: likewise, by id; of an attached federation the ids.
    """

    name: str
    file: PlanFile
    strikes: tuple[Strike, ...]
    server: ServerConfig | None
    nodes: dict[str, NodeConfig | None]

    def needs(self, what: Literal["secured", "clocked"]) -> bool:
        """Whether a fault needs it."""
        return any(getattr(strike.fault, what) for strike in self.strikes)


def shipped() -> list[str]:
    """Names of the plans that come with the package."""
    return sorted(entry.name.removesuffix(".toml") for entry in _PLANS.iterdir() if entry.name.endswith(".toml"))


def load_plan(name: str, *, out: Path, seconds: float | None = None, buffered: bool = False) -> Plan:
    """Read and check a plan, and draw its schedule.

    Args:
        name: path of a TOML file, or a shipped plan's name.
        out: folder for everything that the drill leaves.
        seconds: the drill lasts so long instead of `duration_s`; moments scale with it, what heals a fault does not.
        buffered: the federation's rounds take what comes, unless the plan says otherwise.

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
    file = _taking_what_comes(file, path) if buffered else file
    nodes = _nodes(file, path.resolve().parent, out)
    faults = [_checked(file, number, nodes, path) for number in range(len(file.faults))]
    strikes = _schedule(file, faults, list(nodes), path)
    server = _server(file, strikes, len(nodes), path, out) if file.attach is None else None
    return Plan(path.stem, file, strikes, server, nodes)


def _scaled(file: PlanFile, seconds: float | None) -> PlanFile:
    if seconds is None:
        return file
    if not SHORTEST_S <= seconds <= LONGEST_S:
        raise ConfigError(
            f"--seconds {seconds:g}", "is no duration of a drill", f"give {SHORTEST_S:g} to {LONGEST_S:.0f}"
        )
    factor = seconds / file.duration_s

    def scale(fault: FaultPlan) -> FaultPlan:
        given = {key: moments for key in ("at", "between") if (moments := getattr(fault, key))}
        return fault.model_copy(
            update={key: tuple(factor * moment for moment in moments) for key, moments in given.items()}
        )

    return file.model_copy(update={"duration_s": seconds, "faults": tuple(map(scale, file.faults))})


def _taking_what_comes(file: PlanFile, path: Path) -> PlanFile:
    plan = file.federation
    if file.attach is not None or plan.config is not None:
        problem = f"is for a federation that the drill configures, which {path} does not describe"
        raise ConfigError("--buffered", problem, 'set rounds.mode = "buffered" in its federation.toml')
    rounds = {**_BUFFERED, "buffer_size": max(1, plan.nodes // 2), **plan.rounds}
    return file.model_copy(update={"federation": plan.model_copy(update={"rounds": rounds})})


def _nodes(file: PlanFile, folder: Path, out: Path) -> dict[str, NodeConfig | None]:
    if file.attach is not None:
        return dict.fromkeys(file.attach.nodes)
    if file.federation.config is None:
        names = [f"node-{number}" for number in range(file.federation.nodes)]
        configs = [
            NodeConfig(id=name, federation=FEDERATION, data=out / f"{name}.jsonl", state_dir=out / name)
            for name in names
        ]
    else:
        configs = [load_config(folder / path, NodeConfig) for path in file.federation.node_configs]
    ours = {"exit_when_finished": False}
    return {config.id: config.model_copy(update=ours | {"state_dir": out / config.id}) for config in configs}


def _server(file: PlanFile, strikes: tuple[Strike, ...], nodes: int, path: Path, out: Path) -> ServerConfig:
    plan = file.federation
    if plan.config is not None:
        config = load_config(plan.config, ServerConfig)
        _check_quorum(config.rounds, nodes, f"{plan.config}: rounds")
        return config.model_copy(update={"state_dir": out / SERVER, "once": False})
    table = {**_ROUNDS, "min_nodes": max(1, nodes // 2), **plan.rounds}
    if "count" not in table:
        lasts = max([file.duration_s, *(strike.at + strike.for_s for strike in strikes)])
        a_round_s = 4 * max(plan.pace_s, 0.005)
        if table.get("mode") == "buffered":
            a_round_s *= 0.3 * min(1.0, table.get("buffer_size", nodes) / nodes)  # what comes meanwhile counts too
        table["count"] = ceil(lasts / a_round_s) + SPARE_ROUNDS
    rounds = check_config(table, RoundsConfig, where=f"{path}: federation.rounds")
    _check_quorum(rounds, nodes, f"{path}: federation.rounds")
    return ServerConfig(
        federation=FEDERATION,
        state_dir=out / SERVER,
        rounds=rounds,
        guards=plan.guards,
        early_stopping=plan.early_stopping,
        engine="toy",
        toy_weights=plan.weights,
    )


def _check_quorum(rounds: RoundsConfig, nodes: int, where: str) -> None:
    for key in ("min_nodes", "min_updates"):
        if (least := getattr(rounds, key)) > nodes:
            problem = f"is {least}, but the drill has {nodes} nodes"
            raise ConfigError(f"{where}.{key}", problem, "ask for fewer, or start more")


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
    for name in nodes if target == NODES else [target]:
        if kind.scalars and (node := nodes.get(name)) is not None and node.uplink == "values":
            problem = f"{entry.fault!r} changes projected gradients, and {name} sends displacements"
            raise ConfigError(f"{where}.target", problem, 'name a node with uplink = "path"')
    if file.attach is not None:
        _check_attached(file.attach, fault, target.removeprefix(LINK), where)
    return fault, target.removeprefix(LINK)


def _check_attached(attach: AttachPlan, fault: Fault, target: str, where: str) -> None:
    if not fault.attachable:
        problem = f"{fault.name!r} strikes what a drill started itself"
        raise ConfigError(f"{where}.fault", problem, "leave it out with attach")
    table = {SERVER: attach.server, **attach.nodes}
    key = "proxy_port" if fault.on in ("link", "node") else "pid"
    for name in attach.nodes if target == NODES else [target]:
        if getattr(table[name], key) is None:
            raise ConfigError(f"{where}.target", f"attach names no {key} of {name}", f"add {key}, or strike another")
    if attach.broker.tls and key == "proxy_port":
        raise ConfigError("attach.broker.url", "is encrypted, which no proxy can treat", "leave link faults out")


# --- the schedule ---


def _schedule(file: PlanFile, faults: list[tuple[Fault, str]], nodes: list[str], path: Path) -> tuple[Strike, ...]:
    """Draw when and whom, within the duration; ConfigError where so many faults do not fit."""
    lanes = 1 + _at_once(len(nodes))
    busy_s = sum(_count(entry, file.duration_s) * (entry.for_s + REST_S) for entry in file.faults)
    longest_s = max(entry.for_s for entry in file.faults) + REST_S
    if busy_s <= lanes * (file.duration_s + longest_s):
        for factor in _EARLIER:
            strikes = _placed(file, faults, nodes, factor)
            if strikes[-1].at <= file.duration_s:
                return strikes
    problem = f"do not fit into {file.duration_s:g} s: with a rest after each, one at a time strikes broker or server"
    raise ConfigError(
        f"{path}: faults", f"{problem}, {lanes - 1} nodes", "plan fewer or shorter ones, or a longer drill"
    )


def _placed(file: PlanFile, faults: list[tuple[Fault, str]], nodes: list[str], factor: float) -> tuple[Strike, ...]:
    """By time; whatever is struck already, or one node too many at a time, waits."""
    wanted = sorted(
        (moment, number, turn)
        for number, entry in enumerate(file.faults)
        for turn, moment in enumerate(_moments(entry, file.duration_s, factor, _chance(file, number)))
    )
    core, others = [0.0], [0.0] * _at_once(len(nodes))  # when each place among the struck is free again
    free = dict.fromkeys([BROKER, SERVER, *nodes], 0.0)
    placed = list[Strike]()
    for moment, number, turn in wanted:
        fault, target = faults[number]
        for_s, random = file.faults[number].for_s, _chance(file, number, turn)
        candidates = random.sample(nodes, len(nodes)) if target == NODES else [target]
        places = core if is_core(target) else others
        begin = max(moment, min(places))
        chosen = min(candidates, key=lambda name: max(begin, free[name]))
        at = max(begin, free[chosen])
        place = max((time, number) for number, time in enumerate(places) if time <= at)[1]
        places[place] = free[chosen] = at + for_s + REST_S
        placed.append(Strike(at, fault, chosen, for_s, f"{file.seed} {number} {turn} strike"))
    return tuple(sorted(placed, key=lambda strike: strike.at))


def _chance(file: PlanFile, *place: int) -> Random:
    return Random(" ".join(map(str, (file.seed, *place))))  # noqa: S311 - a schedule that can be repeated


def _window(entry: FaultPlan, duration_s: float) -> tuple[float, float, float]:
    """First and last moment, and once in how many seconds."""
    first, last = entry.between or (0.0, duration_s)
    return first, last, min(entry.every or last - first, last - first)


def _count(entry: FaultPlan, duration_s: float) -> int:
    first, last, every = _window(entry, duration_s)
    return int((last - first) / every + 1e-9) if entry.at is None else len(entry.at)


def _moments(entry: FaultPlan, duration_s: float, factor: float, random: Random) -> list[float]:
    if entry.at is not None:
        return sorted(entry.at)
    first, _, every = _window(entry, duration_s)
    turns = range(_count(entry, duration_s))
    return [first + factor * every * (turn + random.random()) for turn in turns]


def is_core(target: str) -> bool:
    """Whether everybody depends on it."""
    return target in (BROKER, SERVER)


def _at_once(nodes: int) -> int:
    """How many nodes may be struck at once: a third."""
    return max(1, nodes // 3)
