"""What people read of a ledger as tables and lines."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from meerkat_mq.core.metrics import meaning
from meerkat_mq.errors import printable, printable_lines
from meerkat_mq.ledger.shown import NodeShown, RebuiltShown, RoundShown, RunShown, StepShown, TermShown, UpdateShown
from meerkat_mq.observe.figures import DASH, duration, human_bytes
from meerkat_mq.observe.fitting import Column, FittingTable
from meerkat_mq.observe.measure import beside, measure_of

SHORT = 8
MOST_SHOWN = 100


def say(console: Console, text: str) -> None:
    """Print a line as it is."""
    console.print(printable(text), markup=False, highlight=False, emoji=False, soft_wrap=True)


# --- status ---


def status_line(run: RunShown) -> str:
    """The run in a line."""
    online = sum(node.status == "online" for node in run.nodes)
    flagged = [node.node for node in run.nodes if node.flagged]
    early = [node.node for node in run.nodes if node.early_stopped_since is not None]
    measure = measure_of(run.figures)
    parts = [
        f"{run.round:,} of {run.rounds:,} rounds",
        *([f"{measure.words} {measure.shown(run.figures[measure.key])}"] if measure else []),
        f"loss {_number(run.loss)}",
        f"{_span(run.round_s)} a round",
        f"server {_running(run)}",
        f"{online} of {len(run.nodes)} nodes online" + f", {run.asleep} asleep" * bool(run.asleep),
        *([f"{_number(run.staleness)} versions stale"] if run.mode and run.staleness is not None else []),
        *([f"flagged: {', '.join(flagged)}"] if flagged else []),
        *([f"early-stopped: {', '.join(early)}"] if early else []),
        *([run.warning] if run.warning else []),
    ]
    return ", ".join(parts)


def status_table(run: RunShown) -> RenderableType:
    """The run, and a line a node."""
    figures = pairs(
        _measured(run),
        ("loss", _loss(run)),
        ("round", _progress(run)),
        ("pace", f"{_span(run.round_s)} a round, the last closed {_ago(run.closed_s)}"),
        ("server", f"{_running(run)}; term {run.term} on {run.host or DASH} ({run.server_id or DASH})"),
        ("run", f"{run.run} of federation {run.federation}"),
        *([("mode", run.mode), ("staleness", f"{_number(run.staleness)} versions in the mean")] if run.mode else []),
        *([("asleep", f"{run.asleep:,} of {len(run.nodes):,} nodes")] if run.asleep else []),
        *([("early stopping", run.early_stopping)] if run.early_stopping else []),
    )
    warning = [Text(printable(run.warning), style="bold red")] if run.warning else []
    if not run.nodes:
        return Group(*warning, figures, Text("\nno node was seen yet"))
    return Group(*warning, figures, Text(), _node_table(run.nodes, DASH if run.finished else "many"), *_counted(run))


def _counted(run: RunShown) -> Iterable[RenderableType]:
    """What was counted in the recent rounds, and what it means."""
    if run.counts:
        yield Text()
        yield pairs(*((f"{name}: {count:,}", meaning(name)) for name, count in run.counts.items()))


def _measured(run: RunShown) -> tuple[str, str]:
    """The figure that the run is judged by, and what it is."""
    measure = measure_of(run.figures)
    if measure is None:
        return ("accuracy", "not measured: the server has no [evaluation]" if run.evaluated is None else DASH)
    after, before, gained = run.figures[measure.key], run.base_figures.get(measure.key), ""
    if before is not None and run.evaluated:
        gained = f", {measure.change(before, after)} from {measure.shown(before)}"
    others = f"; {found}" if (found := beside(run.figures)) else ""
    rounds = f"{run.evaluated or 0:,} round{'s' * (run.evaluated != 1)}"
    return (measure.words, f"{measure.shown(after)} after {rounds}{gained}{others}")


def _loss(run: RunShown) -> str:
    held_out = "" if run.held_out_loss is None else f"; {_number(run.held_out_loss)} on held-out rows"
    return f"{_number(run.loss)} on the nodes' rows{held_out}"


def _progress(run: RunShown) -> str:
    if run.finished:
        return f"all {run.rounds:,} closed: finished"
    return f"{run.round:,} of {run.rounds:,} closed; round {run.round:,} is open, {run.heard:,} acknowledged"


def _running(run: RunShown) -> str:
    """Whether the server is there, in words."""
    if run.running is None:
        return "not known to run: ask on its own host"
    return "running" if run.running else "not running"


def _node_table(nodes: Sequence[NodeShown], long_ago: str) -> FittingTable[NodeShown]:
    """`long_ago`: how far a node is behind that gave nothing lately."""
    measured = any(node.gradip is not None for node in nodes)
    judged = any(node.judged is not None for node in nodes)
    columns: list[Column[NodeShown]] = [
        Column("node", lambda node: node.node, words=True),
        Column("slot", lambda node: DASH if node.slot is None else f"{node.slot}", drop=1),
        Column("status", lambda node: node.status or "never", words=True),
        Column("seen", lambda node: _ago(node.seen_s), left=True),
        Column("rows", lambda node: f"{node.rows:,}", drop=3),
        Column("updates", lambda node: f"{node.updates:,}"),
        Column("bytes", lambda node: human_bytes(node.packet_bytes)),
        Column("behind", lambda node: long_ago if node.behind is None else f"{node.behind:,}"),
        Column("verdict", _verdict, words=True),
        Column("GradIP", lambda node: _number(node.gradip), drop=2, shown=measured),
        Column("virtual path", _judgement, words=True, shown=judged),
    ]
    return FittingTable(columns, nodes, style=lambda node: "bold red" if node.flagged else None, most=MOST_SHOWN)


def _verdict(node: NodeShown) -> str:
    verdict = f"flagged: {node.flagged}" if node.flagged else node.verdict
    displacement = f", displacement of {human_bytes(node.displacement)}" + ", shortened" * node.shortened
    return verdict + (displacement if node.displacement else "") or DASH


def _judgement(node: NodeShown) -> str:
    """The verdict on its virtual path, and the numbers behind it."""
    if node.judged is None or node.rho_later is None or node.rho_quiet is None:
        return DASH
    numbers = f"rho_later {node.rho_later:.3g}, rho_quiet {node.rho_quiet:.3g}"
    if node.early_stopped_since is None:
        return f"{numbers} (round {node.judged:,})"
    return f"early-stopped since round {node.early_stopped_since:,}: {numbers} (round {node.judged:,})"


# --- ledger ---


def round_table(rounds: Iterable[RoundShown]) -> FittingTable[RoundShown]:
    """A line a round; of a buffered run with the ages of the newest and the oldest update."""
    rounds = list(rounds)
    buffered = any(shown.buffer for shown in rounds)
    columns: list[Column[RoundShown]] = [
        Column("round", lambda shown: f"{shown.round:,}"),
        Column("term", lambda shown: f"{shown.term:,}", drop=1),
        Column("closed", lambda shown: _clock(shown.closed), left=True),
        Column("asked", lambda shown: f"{shown.asked:,}", drop=4),
        Column("accepted", lambda shown: f"{shown.accepted:,}"),
        Column("refused", lambda shown: f"{len(shown.updates) - shown.accepted:,}"),
        Column("by", _closed_by, words=True),
        Column("age", lambda shown: "–".join(f"{age}" for age in sorted(set(shown.ages))), shown=buffered),
        Column("terms", lambda shown: f"{len(shown.terms):,}", drop=2),
        Column("loss", lambda shown: _number(shown.loss)),
        Column("digest", lambda shown: shown.digest[:SHORT] or DASH, left=True, drop=3),
    ]
    return FittingTable(columns, rounds)


def _closed_by(shown: RoundShown) -> str:
    return "deadline" if shown.overdue else "buffer full" if shown.full else "all updates"


def round_pages(rounds: Iterable[RoundShown]) -> RenderableType:
    """Rounds whole: what each entry says, and who contributed."""
    return Group(*map(_round_page, rounds))


def _round_page(shown: RoundShown) -> RenderableType:
    how = "when its buffer was full" if shown.full else "when all expected updates were committed"
    how = "by its deadline" if shown.overdue else how
    figures = pairs(
        ("round", f"{shown.round:,}, closed {_clock(shown.closed)} {how}, under term {shown.term}"),
        ("asked", f"{shown.asked:,} nodes; {shown.accepted:,} of {len(shown.updates):,} updates accepted"),
        ("loss", _number(shown.loss)),
        *([("displacement", _displacement(shown))] if shown.displacement else []),
        ("digest", shown.digest or "none due"),
        ("previous", shown.previous),
        ("hash", shown.hash),
    )
    columns: list[Column[TermShown]] = [
        Column("age", lambda term: f"{term.age}", shown=any(term.age for term in shown.terms)),
        Column("lane", lambda term: f"{term.lane}"),
        Column("step", lambda term: f"{term.step}"),
        Column("seed", lambda term: term.seed, left=True),
        Column("coefficient", lambda term: f"{term.coefficient:.9g}"),
    ]
    return Group(figures, Text(), FittingTable(columns, shown.terms), Text(), path_table(shown.updates, by_node=True))


def _displacement(shown: RoundShown | UpdateShown) -> str:
    return f"{shown.displacement}, {human_bytes(shown.size)}"


class _Step(NamedTuple):
    """A local step of an update, or its displacement."""

    of: UpdateShown
    number: int
    seed: str
    g: str


def _steps(update: UpdateShown) -> Iterator[_Step]:
    if update.displacement:
        yield _Step(update, 0, f"displacement {_displacement(update)}", DASH)
    for number, (seed, scalar) in enumerate(zip(update.seeds, update.scalars, strict=True)):
        yield _Step(update, number, seed, f"{scalar:.9g}")


def path_table(updates: Iterable[UpdateShown], *, by_node: bool = False) -> FittingTable[_Step]:
    """Updates, a line a local step or displacement: of one node over the rounds, or `by_node` of one round."""
    updates = list(updates)
    sparse = any(update.displacement for update in updates)
    columns: list[Column[_Step]] = [
        Column("node", lambda step: step.of.node, words=True, shown=by_node),
        Column("slot", lambda step: f"{step.of.slot}", drop=2, shown=by_node),
        Column("round", lambda step: f"{step.of.round:,}", shown=not by_node),
        Column("boot", lambda step: f"{step.of.boot}", drop=1),
        Column("age", lambda step: f"{step.of.age}", shown=any(update.age for update in updates)),
        Column("weight", lambda step: f"{step.of.weight:,}", drop=3),
        Column("lane", lambda step: DASH if step.of.displacement else f"{step.of.lane}", drop=4),
        Column("step", lambda step: DASH if step.of.displacement else f"{step.number}"),
        Column("seed", lambda step: step.seed, left=True, words=sparse),
        Column("g", lambda step: step.g),
        Column("loss", lambda step: "" if step.number else f"{step.of.loss:.5g}"),
        Column("verdict", lambda step: "" if step.number else step.of.verdict, words=True),
    ]
    return FittingTable(columns, [step for update in updates for step in _steps(update)])


def step_table(steps: Sequence[StepShown], *, head: bool = True) -> FittingTable[StepShown]:
    """A line a projected gradient; where there are many, page by page, the first with a head."""
    columns: list[Column[StepShown]] = [
        Column("round", lambda step: f"{step.round}", least=6),
        Column("node", lambda step: step.node, words=True, least=16),
        Column("lane", lambda step: f"{step.lane}", least=4, drop=1),
        Column("step", lambda step: f"{step.step}", least=4),
        Column("seed", lambda step: step.seed, left=True, least=16, drop=2),
        Column("g", lambda step: f"{step.g:.9g}", least=15),
        Column("GradIP", lambda step: DASH if step.gradip is None else f"{step.gradip:.9g}", least=15),
    ]
    if isinstance(steps[0], RebuiltShown):
        columns.append(Column("distance", _distance, least=15))
    return FittingTable(columns, steps, show_header=head)


def _distance(step: StepShown) -> str:
    return f"{step.distance:.9g}" if isinstance(step, RebuiltShown) else DASH


# --- cells ---


def pairs(*pairs: tuple[str, str]) -> Table:
    """Labels and what they say."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in pairs:
        table.add_row(label, Text(printable_lines(text)))
    return table


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:.5g}"


def _span(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    return f"{1000 * seconds:.0f} ms" if seconds < 0.995 else duration(seconds)


def _ago(seconds: float | None) -> str:
    return DASH if seconds is None else f"{duration(max(0.0, seconds))} ago"


def _clock(at: str) -> str:
    """A time in UTC, to the second: "2026-11-28 19:20:08Z"."""
    return f"{at[:10]} {at[11:19]}Z"
