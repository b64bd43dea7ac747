"""What people read of a ledger as tables and lines."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from meerkat_mq.observe.figures import DASH, duration, human_bytes, printable
from meerkat_mq.observe.shown import NodeShown, RebuiltShown, RoundShown, RunShown, StepShown, UpdateShown

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
    parts = [
        f"round {run.version:,} of {run.rounds:,}",
        f"loss {_number(run.loss)}",
        f"{_span(run.round_s)} a round",
        f"{online} of {len(run.nodes)} nodes online" + f", {run.asleep} asleep" * bool(run.asleep),
        *([f"{_number(run.staleness)} versions stale"] if run.mode and run.staleness is not None else []),
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
        *([("mode", run.mode), ("staleness", f"{_number(run.staleness)} versions in the mean")] if run.mode else []),
        *([("asleep", f"{run.asleep:,} of {len(run.nodes):,} nodes")] if run.asleep else []),
        *([("early stopping", run.early_stopping)] if run.early_stopping else []),
    ):
        figures.add_row(label, _text(text))
    if not run.nodes:
        return Group(figures, _text("\nno node was seen yet"))
    more = [_text(f"… and {len(run.nodes) - MOST_SHOWN:,} more")] if len(run.nodes) > MOST_SHOWN else []
    measured = any(node.gradip is not None for node in run.nodes)
    judged = any(node.judged is not None for node in run.nodes)
    long_ago = DASH if run.version == run.rounds else "many"
    table = _node_table(run.nodes[:MOST_SHOWN], long_ago, measured=measured, judged=judged)
    return Group(figures, Text(), table, *more)


def _progress(run: RunShown) -> str:
    if run.version == run.rounds:
        return "finished"
    return f"{run.heard:,} heard in the open one"


def _node_table(nodes: Iterable[NodeShown], long_ago: str, *, measured: bool, judged: bool) -> Table:
    """`long_ago`: how far a node is behind that gave nothing lately."""
    heads = ["node", ">slot", "seen", ">boot", ">rows", ">updates", ">bytes", ">behind", "verdict"]
    table = _table(*heads, *([">GradIP"] if measured else []), *(["virtual path"] if judged else []))
    for node in nodes:
        verdict = f"flagged: {node.flagged}" if node.flagged else node.verdict
        verdict += f", displacement of {human_bytes(node.displacement)}" if node.displacement else ""
        table.add_row(
            _text(node.node),
            DASH if node.slot is None else f"{node.slot}",
            _text(f"{node.status or 'never'} {_ago(node.seen_s)}"),
            DASH if node.boot is None else f"{node.boot:08x}",
            f"{node.rows:,}",
            f"{node.updates:,}",
            human_bytes(node.packet_bytes),
            long_ago if node.behind is None else f"{node.behind:,}",
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
    """A line a round; of a buffered run with the ages of the newest and the oldest update."""
    rounds = list(rounds)
    buffered = any(shown.buffer for shown in rounds)
    heads = [">round", ">term", "closed", ">asked", ">accepted", ">refused", "by", *([">age"] if buffered else [])]
    table = _table(*heads, ">terms", ">loss", "digest")
    for shown in rounds:
        table.add_row(
            f"{shown.version:,}",
            f"{shown.term:,}",
            _clock(shown.closed),
            f"{shown.asked:,}",
            f"{shown.accepted:,}",
            f"{len(shown.updates) - shown.accepted:,}",
            "deadline" if shown.overdue else "buffer full" if shown.full else "all heard",
            *([_ages(*shown.ages)] if buffered else []),
            f"{len(shown.terms):,}",
            _number(shown.loss),
            shown.digest[:SHORT] or DASH,
        )
    return table


def _ages(newest: int, oldest: int) -> str:
    return f"{newest}" if newest == oldest else f"{newest}–{oldest}"


def round_pages(rounds: Iterable[RoundShown]) -> RenderableType:
    """Rounds whole: what each entry says, and who contributed."""
    return Group(*map(_round_page, rounds))


def _round_page(shown: RoundShown) -> RenderableType:
    figures = Table.grid(padding=(0, 2))
    figures.add_column(style="bold", no_wrap=True)
    figures.add_column()
    how = "when its buffer was full" if shown.full else "when all expected were heard"
    how = "by its deadline" if shown.overdue else how
    for label, text in (
        ("round", f"{shown.version:,}, closed {_clock(shown.closed)} {how}, under term {shown.term}"),
        ("asked", f"{shown.asked:,} nodes; {shown.accepted:,} of {len(shown.updates):,} updates accepted"),
        ("loss", _number(shown.loss)),
        *([("displacement", _displacement(shown))] if shown.displacement else []),
        ("digest", shown.digest or "none due"),
        ("previous", shown.previous),
        ("hash", shown.hash),
    ):
        figures.add_row(label, text)
    aged = any(term.age for term in shown.terms)
    terms = _table(*([">age"] if aged else []), ">lane", ">step", "seed", ">coefficient")
    for term in shown.terms:
        age = [f"{term.age}"] if aged else []
        terms.add_row(*age, f"{term.lane}", f"{term.step}", term.seed, f"{term.coefficient:.9g}")
    return Group(figures, Text(), terms, Text(), path_table(shown.updates, by_node=True))


def _displacement(shown: RoundShown | UpdateShown) -> str:
    return f"{shown.displacement}, {human_bytes(shown.size)}"


def path_table(updates: Iterable[UpdateShown], *, by_node: bool = False) -> Table:
    """Updates, a line a local step or displacement: of one node over the rounds, or `by_node` of one round."""
    updates = list(updates)
    aged = any(update.age for update in updates)
    first = ("node", ">slot", ">boot") if by_node else (">round", ">boot")
    table = _table(*first, *([">age"] if aged else []), ">weight", ">lane", ">step", "seed", ">g", ">loss", "verdict")
    for update in updates:
        boot = f"{update.boot:08x}"
        head = [_text(update.node), f"{update.slot}", boot] if by_node else [f"{update.version:,}", boot]
        head += [f"{update.age}"] if aged else []
        if update.displacement:
            whole = [f"{update.weight:,}", DASH, DASH, f"displacement {_displacement(update)}", DASH]
            table.add_row(*head, *whole, f"{update.loss:.5g}", update.verdict)
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
