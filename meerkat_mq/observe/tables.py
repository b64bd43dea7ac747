"""What people read of a ledger as tables and lines."""

from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from meerkat_mq.core.metrics import meaning
from meerkat_mq.errors import printable
from meerkat_mq.ledger.shown import NodeShown, RebuiltShown, RoundShown, RunShown, StepShown, UpdateShown
from meerkat_mq.observe.figures import DASH, duration, human_bytes, percent, points
from meerkat_mq.observe.fitting import Column, FittingTable

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
        f"{run.round:,} of {run.rounds:,} rounds",
        *([f"accuracy {percent(run.accuracy)}"] if run.accuracy is not None else []),
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
    figures = _pairs(
        ("accuracy", _accuracy(run)),
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
        return Group(*warning, figures, _text("\nno node was seen yet"))
    more = [_text(f"… and {len(run.nodes) - MOST_SHOWN:,} more")] if len(run.nodes) > MOST_SHOWN else []
    measured = any(node.gradip is not None for node in run.nodes)
    judged = any(node.judged is not None for node in run.nodes)
    long_ago = DASH if run.finished else "many"
    table = _node_table(run.nodes[:MOST_SHOWN], long_ago, measured=measured, judged=judged)
    return Group(*warning, figures, Text(), table, *more, *_counted(run))


def _counted(run: RunShown) -> Iterable[RenderableType]:
    """What was counted in the recent rounds, and what it means."""
    if run.counts:
        yield Text()
        yield _pairs(*((f"{name}: {count:,}", meaning(name)) for name, count in run.counts.items()))


def _accuracy(run: RunShown) -> str:
    if run.accuracy is None:
        return "not measured: the server has no [evaluation]" if run.evaluated is None else DASH
    gained = ""
    if run.base_accuracy is not None and run.evaluated:
        gained = f", {points(run.accuracy - run.base_accuracy)} from {percent(run.base_accuracy)}"
    return f"{percent(run.accuracy)} after {_rounds(run.evaluated or 0)}{gained}"


def _loss(run: RunShown) -> str:
    held_out = "" if run.held_out_loss is None else f"; {_number(run.held_out_loss)} on held-out rows"
    return f"{_number(run.loss)} on the nodes' rows{held_out}"


def _rounds(count: int) -> str:
    return f"{count:,} round{'' if count == 1 else 's'}"


def _progress(run: RunShown) -> str:
    if run.finished:
        return f"all {run.rounds:,} closed: finished"
    return f"{run.round:,} of {run.rounds:,} closed; round {run.round:,} is open, {run.heard:,} acknowledged"


def _running(run: RunShown) -> str:
    """Whether the server is there, in words."""
    if run.running is None:
        return "not known to run: ask on its own host"
    return "running" if run.running else "not running"


def _node_table(nodes: Iterable[NodeShown], long_ago: str, *, measured: bool, judged: bool) -> FittingTable:
    """`long_ago`: how far a node is behind that gave nothing lately."""
    table = FittingTable(
        [
            Column("node", words=True),
            Column("slot", right=True, drop=1),
            Column("status", words=True),
            Column("seen"),
            Column("rows", right=True, drop=3),
            Column("updates", right=True),
            Column("bytes", right=True),
            Column("behind", right=True),
            Column("verdict", words=True),
            *([Column("GradIP", right=True, drop=2)] if measured else []),
            *([Column("virtual path", words=True)] if judged else []),
        ]
    )
    for node in nodes:
        verdict = f"flagged: {node.flagged}" if node.flagged else node.verdict
        verdict += f", displacement of {human_bytes(node.displacement)}" if node.displacement else ""
        table.add(
            node.node,
            DASH if node.slot is None else f"{node.slot}",
            node.status or "never",
            _ago(node.seen_s),
            f"{node.rows:,}",
            f"{node.updates:,}",
            human_bytes(node.packet_bytes),
            long_ago if node.behind is None else f"{node.behind:,}",
            verdict or DASH,
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


def round_table(rounds: Iterable[RoundShown]) -> FittingTable:
    """A line a round; of a buffered run with the ages of the newest and the oldest update."""
    rounds = list(rounds)
    buffered = any(shown.buffer for shown in rounds)
    table = FittingTable(
        [
            Column("round", right=True),
            Column("term", right=True, drop=1),
            Column("closed"),
            Column("asked", right=True, drop=4),
            Column("accepted", right=True),
            Column("refused", right=True),
            Column("by", words=True),
            *([Column("age", right=True)] if buffered else []),
            Column("terms", right=True, drop=2),
            Column("loss", right=True),
            Column("digest", drop=3),
        ]
    )
    for shown in rounds:
        table.add(
            f"{shown.round:,}",
            f"{shown.term:,}",
            _clock(shown.closed),
            f"{shown.asked:,}",
            f"{shown.accepted:,}",
            f"{len(shown.updates) - shown.accepted:,}",
            "deadline" if shown.overdue else "buffer full" if shown.full else "all updates",
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
    how = "when its buffer was full" if shown.full else "when all expected updates were committed"
    how = "by its deadline" if shown.overdue else how
    figures = _pairs(
        ("round", f"{shown.round:,}, closed {_clock(shown.closed)} {how}, under term {shown.term}"),
        ("asked", f"{shown.asked:,} nodes; {shown.accepted:,} of {len(shown.updates):,} updates accepted"),
        ("loss", _number(shown.loss)),
        *([("displacement", _displacement(shown))] if shown.displacement else []),
        ("digest", shown.digest or "none due"),
        ("previous", shown.previous),
        ("hash", shown.hash),
    )
    aged = any(term.age for term in shown.terms)
    heads = [*(["age"] if aged else []), "lane", "step", "seed", "coefficient"]
    terms = FittingTable([Column(head, right=head != "seed") for head in heads])
    for term in shown.terms:
        age = [f"{term.age}"] if aged else []
        terms.add(*age, f"{term.lane}", f"{term.step}", term.seed, f"{term.coefficient:.9g}")
    return Group(figures, Text(), terms, Text(), path_table(shown.updates, by_node=True))


def _displacement(shown: RoundShown | UpdateShown) -> str:
    return f"{shown.displacement}, {human_bytes(shown.size)}"


def path_table(updates: Iterable[UpdateShown], *, by_node: bool = False) -> FittingTable:
    """Updates, a line a local step or displacement: of one node over the rounds, or `by_node` of one round."""
    updates = list(updates)
    aged = any(update.age for update in updates)
    first = [Column("node", words=True), Column("slot", right=True, drop=2)]
    table = FittingTable(
        [
            *(first if by_node else [Column("round", right=True)]),
            Column("boot", right=True, drop=1),
            *([Column("age", right=True)] if aged else []),
            Column("weight", right=True, drop=3),
            Column("lane", right=True, drop=4),
            Column("step", right=True),
            Column("seed", words=any(update.displacement for update in updates)),
            Column("g", right=True),
            Column("loss", right=True),
            Column("verdict", words=True),
        ]
    )
    for update in updates:
        head = [update.node, f"{update.slot}"] if by_node else [f"{update.round:,}"]
        head += [f"{update.boot}", *([f"{update.age}"] if aged else []), f"{update.weight:,}"]
        verdict = [f"{update.loss:.5g}", update.verdict]
        if update.displacement:
            table.add(*head, DASH, DASH, f"displacement {_displacement(update)}", DASH, *verdict)
        for step, (seed, scalar) in enumerate(zip(update.seeds, update.scalars, strict=True)):
            whole = [f"{update.lane}", f"{step}", seed, f"{scalar:.9g}"]
            table.add(*head, *whole, *(verdict if step == 0 else ["", ""]))
    return table


def step_table(steps: Sequence[StepShown], *, head: bool = True) -> FittingTable:
    """A line a projected gradient; where there are many, page by page, the first with a head."""
    columns = [
        Column("round", right=True, least=6),
        Column("node", words=True, least=16),
        Column("lane", right=True, least=4, drop=1),
        Column("step", right=True, least=4),
        Column("seed", least=16, drop=2),
        Column("g", right=True, least=15),
        Column("GradIP", right=True, least=15),
        *([Column("distance", right=True, least=15)] if isinstance(steps[0], RebuiltShown) else []),
    ]
    table = FittingTable(columns, show_header=head)
    for step in steps:
        table.add(
            f"{step.round}",
            step.node,
            f"{step.lane}",
            f"{step.step}",
            step.seed,
            f"{step.g:.9g}",
            DASH if step.gradip is None else f"{step.gradip:.9g}",
            *([f"{step.distance:.9g}"] if isinstance(step, RebuiltShown) else []),
        )
    return table


# --- cells ---


def _pairs(*pairs: tuple[str, str]) -> Table:
    """Labels and what they say."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in pairs:
        table.add_row(label, _text(text))
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


def _clock(at: str) -> str:
    """A time in UTC, to the second: "2026-11-28 19:20:08Z"."""
    return f"{at[:10]} {at[11:19]}Z"
