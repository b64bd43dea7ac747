"""The end of a run on a terminal."""

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.errors import printable
from meerkat_mq.observe.figures import (
    DASH,
    MOST_NAMED,
    duration,
    human_bytes,
    human_factor,
    named,
    percent,
    points,
    small_percent,
)
from meerkat_mq.observe.report import NodeReport, Report

MOST_NODES = 40
MOST_CLASSES = 5
OTHER_COLUMNS_WIDTH = 48  # of the node table, its node column apart


def print_summary(console: Console, report: Report) -> None:
    """Print the figures of a run, and its nodes as a table."""
    figures = Table.grid(padding=(0, 2))
    figures.add_column(style="bold", no_wrap=True)
    figures.add_column()
    for label, lines in (
        ("accuracy", accuracy_lines(report)),
        ("weights", weight_lines(report)),
        ("time", [time_line(report)]),
        ("sent", cost_lines(report)),
        ("digests", [digest_line(report)]),
        ("stopped", early_stopping_lines(report)),
        ("counted", [", ".join(f"{why}: {count:,}" for why, count in sorted(report.counts.items()) if why != "left")]),
    ):
        if any(lines):
            figures.add_row(label, Text("\n".join(map(printable, lines))))
    console.print()
    console.print(figures)
    if report.nodes:
        console.print()
        console.print(_node_table(report, console.width))


def accuracy_lines(report: Report) -> list[str]:
    """Accuracy before and after, the majority class, and the bound."""
    if not report.evaluations or report.gained is None:
        return ["not measured"]
    before, after = report.evaluations[0], report.evaluations[-1]
    lines = [
        f"{percent(before.accuracy)} → {percent(after.accuracy)}: {points(report.gained)}",
        f"{percent(after.majority)} by always naming the most frequent class ({after.rows:,} held-out rows)",
    ]
    if report.bound is not None:
        lines.append(f"{percent(report.bound)} by first-order training on the same mask (the bound)")
    if report.gap_closed is not None:
        lines.append(f"{percent(report.gap_closed, 0)} of the gap between before and the bound closed")
    return lines


def weight_lines(report: Report) -> list[str]:
    """How many weights were tuned, and their share."""
    tuned = report.descriptor.weights
    lines = [f"{tuned:,} of {report.parameters:,} tuned: {small_percent(tuned / max(1, report.parameters))} of all"]
    if report.covered:
        lines.append(f"{small_percent(tuned / report.covered)} of the {report.covered:,} in the masked matrices")
    return lines


def time_line(report: Report) -> str:
    """Rounds and seconds."""
    return ", ".join([f"{len(report.rounds):,} rounds in {duration(report.seconds)}", *pace(report)])


def pace(report: Report) -> list[str]:
    """Rounds a second, where any time passed."""
    return [f"{len(report.rounds) / report.seconds:.2g} a second"] if report.seconds > 0 else []


def cost_lines(report: Report) -> list[str]:
    """Bytes of updates against bytes of weights."""
    cost = report.cost
    lines = [f"{human_bytes(cost.packets)} by a node at most, as MQTT packets ({human_bytes(cost.payload)} payload)"]
    for size, what in ((cost.weights, "all weights"), (cost.masked, "the masked values")):
        factor = human_factor(cost.saving(size))
        lines.append(f"instead of {human_bytes(size)} for {what} each round: {factor} × less")
    return lines


def digest_line(report: Report) -> str:
    """Whether every node ended with the server's theta."""
    equal, short = len(report.nodes) - len(report.astray), report.digest[:8]
    if not report.astray:
        return f"all {equal} nodes hold the server's weights, bit for bit ({short}…)"
    return f"{equal} of {len(report.nodes)} nodes hold the server's weights ({short}…); not {named(report.astray)}"


def early_stopping_lines(report: Report) -> list[str]:
    """Who was early-stopped and by which figures; or why nobody can be."""
    config, names = report.early_stopping, report.early_stopped
    if config.by == "off":
        return []
    if not report.judgements:
        return [unchanged_line(report.descriptor.local_steps, config)]
    lines = [f"{len(names)} of {len(report.judgements)} nodes, by {config.by}: {named(names)}"]
    for name in names[:MOST_NAMED]:
        found = report.judgements[name]
        lines.append(f"{name}: rho_later {ratio(found.rho_later)}, rho_quiet {found.rho_quiet:.2f}")
    return lines


def unchanged_line(local_steps: int, config: EarlyStoppingConfig) -> str:
    """Why early stopping is without effect in a run."""
    fewer = f"an early-stopped node would do {config.steps} local {'step' if config.steps == 1 else 'steps'} a round"
    return f"Early stopping changes nothing at T = {local_steps}: {fewer}."


def ratio(value: float) -> str:
    """rho_later for people."""
    return f"{value:.2f}" if math.isfinite(value) else "∞"


def _node_table(report: Report, width: int) -> Table:
    classes = _class_columns(report, width)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("node", no_wrap=True)
    for head in (*(classes or ["rows by class"]), "updates", "payload", "packets", "peak RSS"):
        table.add_column(Text(head), justify="right", no_wrap=True)
    table.add_column("digest", no_wrap=True)
    for name, node in list(report.nodes.items())[:MOST_NODES]:
        rows = [f"{count:,}" for count in node.labels] if classes else [_rows(node)]
        table.add_row(Text(printable(name)), *rows, *_node_figures(node), verdict(node.digest, report.digest))
    if len(report.nodes) > MOST_NODES:
        table.add_row(f"… and {len(report.nodes) - MOST_NODES:,} more")
    return table


def _class_columns(report: Report, width: int) -> list[str]:
    names = [printable(name) for name in report.classes]
    needed = OTHER_COLUMNS_WIDTH + max(map(len, report.nodes)) + sum(max(4, len(name)) + 2 for name in names)
    return names if needed <= width else []


def _rows(node: NodeReport) -> str:
    return "/".join(map(str, node.labels)) if len(node.labels) <= MOST_CLASSES else f"{sum(node.labels):,} in all"


def _node_figures(node: NodeReport) -> list[str]:
    return [
        f"{node.updates:,}",
        human_bytes(node.payload_bytes),
        human_bytes(node.packet_bytes),
        f"{node.peak_rss_mib:,.0f} MiB",
    ]


def verdict(digest: str, servers: str) -> str:
    """A node's digest against the server's."""
    return f"{DASH} not known" if not digest else "✓ equal" if digest == servers else "✗ differs"
