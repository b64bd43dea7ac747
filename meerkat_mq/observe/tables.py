"""A ledger as people and programs read it: the run and its nodes, rounds, one node's path; tables, lines and JSON."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from meerkat_mq.observe.figures import DASH, duration, human_bytes, printable

SHORT = 8
MOST_SHOWN = 100


@dataclass(frozen=True, slots=True)
class NodeShown:
    """A node as the ledger knows it.

    Attributes:
        status: its last word: "starting", "online", "stopped" or "lost".
        seen_s: seconds since it was last heard of.
        rows: size of its data.
        updates: update messages that came from it, repeated ones too.
        packet_bytes: all MQTT packets that came from it.
        behind: closed rounds since the last that it contributed to; None if it is none of the recent ones.
        verdict: on its last update among the recent ones.
        flagged: why it stands out, or "".
        gradip: mean |GradIP| of its recent accepted steps; None if there are none.
        judged: the newest calibration round that judged its virtual path; None: none did.
        rho_later, rho_quiet: what that round found; None: none did.
        early_stopped_since: the calibration round from which on every one early-stopped it; None: it is not.
    """

    node: str
    slot: int | None
    host: str
    status: str
    seen_s: float | None
    boot: int | None
    rows: int
    updates: int
    packet_bytes: int
    behind: int | None
    verdict: str
    flagged: str
    gradip: float | None
    judged: int | None
    rho_later: float | None
    rho_quiet: float | None
    early_stopped_since: int | None


@dataclass(frozen=True, slots=True)
class RunShown:
    """A run as its ledger stands.

    Attributes:
        host: of the server that took the newest term.
        version: rounds closed.
        rounds: of the whole run.
        heard: committed updates of the open round.
        closed_s: seconds since the last round closed.
        round_s: seconds a round, over the recent ones.
        loss: mean over the accepted updates of the last round.
        early_stopping: what it does, in words; "" where it is off.
    """

    federation: str
    run: str
    term: int
    server_id: str
    host: str
    version: int
    rounds: int
    heard: int
    closed_s: float | None
    round_s: float | None
    loss: float | None
    early_stopping: str
    nodes: tuple[NodeShown, ...]


@dataclass(frozen=True, slots=True)
class UpdateShown:
    """What a node gave to a round; `seeds` (16 hex digits) and `scalars` are one a local step."""

    version: int
    node: str
    slot: int
    lane: int
    boot: int
    weight: int
    seeds: tuple[str, ...]
    scalars: tuple[float, ...]
    loss: float
    verdict: str


@dataclass(frozen=True, slots=True)
class StepShown:
    """A projected gradient of a node's virtual path, with GradIP = g·⟨g_p, z⟩; None where that is not measured."""

    version: int
    node: str
    lane: int
    step: int
    seed: str
    g: float
    gradip: float | None


@dataclass(frozen=True, slots=True)
class RebuiltShown(StepShown):
    """The same, with ‖theta_k^t − theta_v‖ after its local step."""

    distance: float


@dataclass(frozen=True, slots=True)
class TermShown:
    """A direction of an entry."""

    lane: int
    step: int
    seed: str
    coefficient: float


@dataclass(frozen=True, slots=True)
class RoundShown:
    """A closed round.

    Attributes:
        closed: Unix time.
        asked: number of nodes asked.
        overdue: whether the deadline closed it.
        loss: mean over the accepted updates; None if there is none.
        digest, previous, hash: hex; no digest where none is due.
        updates: refused ones too, by slot.
    """

    version: int
    term: int
    closed: float
    asked: int
    overdue: bool
    loss: float | None
    digest: str
    previous: str
    hash: str
    terms: tuple[TermShown, ...]
    updates: tuple[UpdateShown, ...]

    @property
    def accepted(self) -> int:
        """How many updates the entry is made of."""
        return sum(update.verdict in ("accepted", "early stopped") for update in self.updates)


def json_line(shown: RunShown | RoundShown | UpdateShown | StepShown) -> str:
    """One JSON object; numbers that are not finite become null."""
    return json.dumps(_finite(asdict(shown)), allow_nan=False)


def _finite(value: object) -> object:
    match value:
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
    return value


def say(console: Console, text: str) -> None:
    """Print a line as it is."""
    console.print(printable(text), markup=False, highlight=False, emoji=False, soft_wrap=True)


# --- status ---


def status_line(run: RunShown) -> str:
    """The run in a line."""
    online = sum(node.status == "online" for node in run.nodes)
    flagged = [node.node for node in run.nodes if node.flagged]
    early = [node.node for node in run.nodes if node.early_stopped_since is not None]
    parts = [
        f"round {run.version:,} of {run.rounds:,}",
        f"loss {_number(run.loss)}",
        f"{_span(run.round_s)} a round",
        f"{online} of {len(run.nodes)} nodes online",
        *([f"flagged: {', '.join(flagged)}"] if flagged else []),
        *([f"early-stopped: {', '.join(early)}"] if early else []),
    ]
    return ", ".join(parts)


def status_table(run: RunShown) -> RenderableType:
    """The run, and a line a node."""
    figures = Table.grid(padding=(0, 2))
    figures.add_column(style="bold", no_wrap=True)
    figures.add_column()
    for label, text in (
        ("run", f"{run.run} of federation {run.federation}"),
        ("server", f"term {run.term} on {run.host or DASH} ({run.server_id or DASH})"),
        ("round", f"{run.version:,} of {run.rounds:,}, {_progress(run)}"),
        ("pace", f"{_span(run.round_s)} a round, the last closed {_ago(run.closed_s)}"),
        ("loss", _number(run.loss)),
        *([("early stopping", run.early_stopping)] if run.early_stopping else []),
    ):
        figures.add_row(label, _text(text))
    if not run.nodes:
        return Group(figures, _text("\nno node was seen yet"))
    more = [_text(f"… and {len(run.nodes) - MOST_SHOWN:,} more")] if len(run.nodes) > MOST_SHOWN else []
    measured = any(node.gradip is not None for node in run.nodes)
    judged = any(node.judged is not None for node in run.nodes)
    return Group(figures, Text(), _node_table(run.nodes[:MOST_SHOWN], measured=measured, judged=judged), *more)


def _progress(run: RunShown) -> str:
    if run.version == run.rounds:
        return "finished"
    return f"{run.heard:,} heard in the open one"


def _node_table(nodes: Iterable[NodeShown], *, measured: bool, judged: bool) -> Table:
    heads = ["node", ">slot", "seen", ">boot", ">rows", ">updates", ">bytes", ">behind", "verdict"]
    table = _table(*heads, *([">GradIP"] if measured else []), *(["virtual path"] if judged else []))
    for node in nodes:
        verdict = f"flagged: {node.flagged}" if node.flagged else node.verdict
        table.add_row(
            _text(node.node),
            DASH if node.slot is None else f"{node.slot}",
            _text(f"{node.status or 'never'} {_ago(node.seen_s)}"),
            DASH if node.boot is None else f"{node.boot:08x}",
            f"{node.rows:,}",
            f"{node.updates:,}",
            human_bytes(node.packet_bytes),
            "many" if node.behind is None else f"{node.behind:,}",
            _text(verdict or DASH),
            *([_number(node.gradip)] if measured else []),
            *([_judgement(node)] if judged else []),
            style="bold red" if node.flagged else None,
        )
    return table


def _judgement(node: NodeShown) -> str:
    """The verdict on its virtual path, and the numbers behind it."""
    if node.judged is None or node.rho_later is None or node.rho_quiet is None:
        return DASH
    numbers = f"rho_later {node.rho_later:.3g}, rho_quiet {node.rho_quiet:.3g}"
    if node.early_stopped_since is None:
        return f"{numbers} (round {node.judged:,})"
    return f"early-stopped since round {node.early_stopped_since:,}: {numbers} (round {node.judged:,})"


# --- ledger ---


def round_table(rounds: Iterable[RoundShown]) -> Table:
    """A line a round."""
    table = _table(">round", ">term", "closed", ">asked", ">accepted", ">refused", "by", ">terms", ">loss", "digest")
    for shown in rounds:
        table.add_row(
            f"{shown.version:,}",
            f"{shown.term:,}",
            _clock(shown.closed),
            f"{shown.asked:,}",
            f"{shown.accepted:,}",
            f"{len(shown.updates) - shown.accepted:,}",
            "deadline" if shown.overdue else "all heard",
            f"{len(shown.terms):,}",
            _number(shown.loss),
            shown.digest[:SHORT] or DASH,
        )
    return table


def round_pages(rounds: Iterable[RoundShown]) -> RenderableType:
    """Rounds whole: what each entry says, and who contributed."""
    return Group(*map(_round_page, rounds))


def _round_page(shown: RoundShown) -> RenderableType:
    figures = Table.grid(padding=(0, 2))
    figures.add_column(style="bold", no_wrap=True)
    figures.add_column()
    how = "by its deadline" if shown.overdue else "when all expected were heard"
    for label, text in (
        ("round", f"{shown.version:,}, closed {_clock(shown.closed)} {how}, under term {shown.term}"),
        ("asked", f"{shown.asked:,} nodes; {shown.accepted:,} of {len(shown.updates):,} updates accepted"),
        ("loss", _number(shown.loss)),
        ("digest", shown.digest or "none due"),
        ("previous", shown.previous),
        ("hash", shown.hash),
    ):
        figures.add_row(label, text)
    terms = _table(">lane", ">step", "seed", ">coefficient")
    for term in shown.terms:
        terms.add_row(f"{term.lane}", f"{term.step}", term.seed, f"{term.coefficient:.9g}")
    return Group(figures, Text(), terms, Text(), path_table(shown.updates, by_node=True))


def path_table(updates: Iterable[UpdateShown], *, by_node: bool = False) -> Table:
    """Updates, a line a local step: of one node over the rounds, or `by_node` of one round."""
    first = ("node", ">slot", ">boot") if by_node else (">round", ">boot")
    table = _table(*first, ">weight", ">lane", ">step", "seed", ">g", ">loss", "verdict")
    for update in updates:
        boot = f"{update.boot:08x}"
        head = [_text(update.node), f"{update.slot}", boot] if by_node else [f"{update.version:,}", boot]
        for step, (seed, scalar) in enumerate(zip(update.seeds, update.scalars, strict=True)):
            whole = [f"{update.weight:,}", f"{update.lane}", f"{step}", seed, f"{scalar:.9g}"]
            table.add_row(*head, *whole, *([f"{update.loss:.5g}", update.verdict] if step == 0 else ["", ""]))
    return table


def step_table(steps: Sequence[StepShown], *, head: bool = True) -> Table:
    """A line a projected gradient; where there are many, page by page, the first with a head."""
    heads = {">round": 6, "node": 16, ">lane": 4, ">step": 4, "seed": 16, ">g": 15, ">GradIP": 15}
    heads |= {">distance": 15} if isinstance(steps[0], RebuiltShown) else {}
    table = _table(*heads)
    table.show_header = head
    for column, width in zip(table.columns, heads.values(), strict=True):
        column.min_width = width
    for step in steps:
        table.add_row(
            f"{step.version}",
            _text(step.node),
            f"{step.lane}",
            f"{step.step}",
            step.seed,
            f"{step.g:.9g}",
            DASH if step.gradip is None else f"{step.gradip:.9g}",
            *([f"{step.distance:.9g}"] if isinstance(step, RebuiltShown) else []),
        )
    return table


# --- cells ---


def _table(*heads: str) -> Table:
    """A plain table; a column whose head starts with ">" is aligned to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in heads:
        right: dict[str, Any] = {"justify": "right"} if head.startswith(">") else {}
        table.add_column(Text(head.removeprefix(">")), overflow="fold", **right)
    return table


def _text(text: str) -> Text:
    return Text("\n".join(map(printable, text.split("\n"))))


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:.5g}"


def _span(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    return f"{1000 * seconds:.0f} ms" if seconds < 0.995 else duration(seconds)


def _ago(seconds: float | None) -> str:
    return DASH if seconds is None else f"{duration(max(0.0, seconds))} ago"


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
