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
    """Print the figures of a run, and its nodes as a table; what is not known is left out."""
    figures = Table.grid(padding=(0, 2))
    figures.add_column(style="bold", no_wrap=True)
    figures.add_column()
    for label, lines in (
        ("warning", [report.warning]),
        ("accuracy", accuracy_lines(report)),
        ("weights", weight_lines(report)),
        ("time", [time_line(report)]),
        ("traffic", cost_lines(report)),
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
    lines = [f"{percent(before.accuracy)} → {percent(after.accuracy)}: {points(report.gained)}"]
    if after.majority is not None:
        rows = "" if after.rows is None else f" ({after.rows:,} held-out rows)"
        lines.append(f"{percent(after.majority)} by always naming the most frequent class{rows}")
    if report.bound is not None:
        lines.append(f"{percent(report.bound)} by first-order training on the same mask (the bound)")
    if report.gap_closed is not None:
        lines.append(f"{percent(report.gap_closed, 0)} of the gap between before and the bound closed")
    return lines


def weight_lines(report: Report) -> list[str]:
    """How many weights were tuned, and their share."""
    tuned = report.descriptor.weights
    if not report.parameters:
        return [f"{tuned:,} tuned"]
    lines = [f"{tuned:,} of {report.parameters:,} tuned: {small_percent(tuned / report.parameters)} of all"]
    if report.covered:
        lines.append(f"{small_percent(tuned / report.covered)} of the {report.covered:,} in the masked matrices")
    return lines


def time_line(report: Report) -> str:
    """Rounds and seconds."""
    took = "" if report.seconds is None else f" in {duration(report.seconds)}"
    return ", ".join([f"{report.closed:,} rounds{took}", *pace(report)])


def pace(report: Report) -> list[str]:
    """Rounds a second, where any time passed."""
    return [f"{report.closed / report.seconds:.2g} a second"] if report.seconds else []


def cost_lines(report: Report) -> list[str]:
    """Bytes of a node in both directions against bytes of weights."""
    cost = report.cost
    if cost is None:
        return []
    received = "" if cost.received is None else f", {human_bytes(cost.received)} received (the mask too)"
    lines = [f"{human_bytes(cost.sent)} sent{received} by a node at most"]
    both = ", both ways" if cost.ways == 2 else ""
    for size, what in ((cost.weights, "all weights"), (cost.masked, "masked values")):
        if size is not None:
            factor = human_factor(cost.saving(size))
            lines.append(f"instead of {human_bytes(cost.ways * size)} for {what} as often{both}: {factor} × less")
    return lines


def digest_line(report: Report) -> str:
    """Which nodes are known to hold the server's theta, at the end or when they began their last update."""
    if not report.ended:
        proven = sum(node.proven is not None for node in report.nodes.values())
        return (
            f"{proven} of {len(report.nodes)} nodes were seen to hold the server's weights, bit for bit"
            if proven
            else ""
        )
    equal, short = len(report.ended) - len(report.astray), report.digest[:8]
    if equal == len(report.nodes):
        return f"all {equal} nodes hold the server's weights, bit for bit ({short}…)"
    others = [name for name in report.nodes if name in report.astray or name not in report.ended]
    return f"{equal} of {len(report.nodes)} nodes hold the server's weights ({short}…); not known to: {named(others)}"


def early_stopping_lines(report: Report) -> list[str]:
    """Who was early-stopped and by which figures; or why nobody can be."""
    config, names = report.early_stopping, report.early_stopped
    if config.by == "off":
        return []
    if report.descriptor.local_steps <= config.steps:
        return [unchanged_line(report.descriptor.local_steps, config)]
    if not report.judgements:
        return ["no calibration round has closed yet"]
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
    for head in (
        *(classes or ["rows by class" if any(node.labels for node in report.nodes.values()) else "rows"]),
        "updates",
        "sent",
        "received",
        "peak RSS",
    ):
        table.add_column(Text(head), justify="right", no_wrap=True)
    table.add_column("weights", no_wrap=True)
    for name, node in list(report.nodes.items())[:MOST_NODES]:
        rows = [f"{count:,}" for count in node.labels] if classes else [_rows(node)]
        table.add_row(Text(printable(name)), *rows, *_node_figures(node), verdict(report, node))
    if len(report.nodes) > MOST_NODES:
        table.add_row(f"… and {len(report.nodes) - MOST_NODES:,} more")
    return table


def _class_columns(report: Report, width: int) -> list[str]:
    if not all(node.labels for node in report.nodes.values()):
        return []
    names = [printable(name) for name in report.classes]
    needed = OTHER_COLUMNS_WIDTH + max(map(len, report.nodes)) + sum(max(4, len(name)) + 2 for name in names)
    return names if needed <= width else []


def _rows(node: NodeReport) -> str:
    if 0 < len(node.labels) <= MOST_CLASSES:
        return "/".join(map(str, node.labels))
    if node.labels:
        return f"{sum(node.labels):,} in all"
    return DASH if node.rows is None else f"{node.rows:,}"


def _node_figures(node: NodeReport) -> list[str]:
    return [
        f"{node.updates:,}",
        *(DASH if size is None else human_bytes(size) for size in (node.sent_bytes, node.received_bytes)),
        DASH if node.peak_rss_mib is None else f"{node.peak_rss_mib:,.0f} MiB",
    ]


def verdict(report: Report, node: NodeReport) -> str:
    """Whether a node holds the server's theta: at its end, or else at the last version of which that was checked."""
    if node.digest and report.digest:
        return "✓ equal" if node.digest == report.digest else "✗ differs"
    return f"{DASH} not known" if node.proven is None else f"✓ at version {node.proven:,}"
