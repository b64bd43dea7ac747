"""What is said of a run, once for the terminal and the report page: headlines, early stopping, a table of its nodes."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple, TypeVar

from rich.console import Console

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.observe.figures import (
    DASH,
    MOST_NAMED,
    duration,
    human_bytes,
    human_factor,
    named,
    percent,
    small_percent,
)
from meerkat_mq.observe.fitting import Column, FittingTable
from meerkat_mq.observe.measure import beside
from meerkat_mq.observe.report import NodeReport, Report
from meerkat_mq.observe.tables import pairs

MOST_NODES = 40
MOST_CLASSES = 5
OTHER_COLUMNS_WIDTH = 48  # of the node table, its node column apart
ValueT = TypeVar("ValueT")


class Headline(NamedTuple):
    """A figure of a run, and what is to be said of it."""

    label: str
    value: str
    details: Sequence[str] = ()

    @property
    def text(self) -> str:
        """The value with the first detail, and the others line by line."""
        return "\n".join([": ".join([self.value, *self.details[:1]]), *self.details[1:]])


# --- what is said ---


def headlines(report: Report) -> Iterator[Headline]:
    """The figures of a run; what is not known is left out."""
    yield from _measured(report)
    yield from _traffic(report)
    yield Headline("Weights tuned", f"{report.descriptor.weights:,}", list(_shares(report)))
    spent = DASH if report.seconds is None else duration(report.seconds)
    pace = f", {report.closed / report.seconds:.2g} a second" if report.seconds else ""
    yield Headline("Training time", spent, [f"{report.closed:,} rounds{pace}"])
    yield from _same(report)


def _measured(report: Report) -> Iterator[Headline]:
    measure, label = report.measure, f"Held-out {report.measure.words}"
    if not report.curve:
        yield Headline(label, "not measured")
        return
    before, after, last = report.curve[0][1], report.curve[-1][1], report.evaluations[-1]
    details, rows = [f"{measure.change(before, after)}, from {measure.shown(before)}"], f" of {last.rows:,} rows"
    if "majority" in last.figures:
        details.append(f"majority class {percent(last.figures['majority'])}{rows * bool(last.rows)}")
    details += [others] if (others := beside(last.figures)) else []
    reached = "first-order training on the same mask reaches"
    bound = [] if report.bound is None else [f"{reached} {measure.shown(report.bound)}"]
    if report.gap_closed is None:
        yield Headline(label, measure.shown(after), details + bound)
        return
    yield Headline(label, measure.shown(after), details)
    yield Headline("Of the gap closed", percent(report.gap_closed, 0), bound)


def _traffic(report: Report) -> Iterator[Headline]:
    """Bytes of the node with the most, against bytes of weights."""
    cost = report.cost
    if cost is None:
        return
    node, details = cost.node, []
    if cost.both:
        both = known(node.sent_bytes, human_bytes), known(node.received_bytes, human_bytes)
        details.append("{} sent, {} received (the mask too)".format(*both))
    for size, what in ((cost.weights, "all weights"), (cost.masked, "masked values")):
        if size is not None:
            less = human_factor(cost.saving(size))
            details.append(f"{less} × less than {what} as often{cost.both}: {human_bytes(size)}")
    yield Headline("Traffic of a node" if cost.both else "Sent by a node", human_bytes(node.traffic_bytes), details)


def _shares(report: Report) -> Iterator[str]:
    tuned = report.descriptor.weights
    if report.parameters:
        yield f"{small_percent(tuned / report.parameters)} of all {report.parameters:,}"
    if report.covered:
        yield f"{small_percent(tuned / report.covered)} of the {report.covered:,} in the masked matrices"


def _same(report: Report) -> Iterator[Headline]:
    """How many nodes are known to hold the server's weights: at the end, or when they began their last update."""
    if report.ended:
        equal, sign = len(report.ended) - len(report.astray), "✗" if report.astray else "✓"
        others = [name for name in report.nodes if name in report.astray or name not in report.ended]
        details = [f"nodes hold its weights, bit for bit ({report.digest[:8]}…)"]
        details += [f"others, or not known: {named(others)}"] if others else []
        yield Headline("Same as the server", f"{sign} {equal} of {len(report.nodes)}", details)
    elif proven := [node for node in report.nodes.values() if node.proven is not None]:
        details = ["nodes began their last update from its weights, bit for bit"]
        yield Headline("Same as the server", f"✓ {len(proven)} of {len(report.nodes)}", details)


def early_stopping_line(report: Report) -> str:
    """Who was early-stopped, or why nobody can be; "" where it is off."""
    config, local_steps, names = report.early_stopping, report.descriptor.local_steps, report.early_stopped
    if config.by == "off":
        return ""
    if local_steps <= config.steps:
        return unchanged_line(local_steps, config)
    if not report.judgements:
        return "No calibration round has closed yet."
    found = f"{len(names)} of {len(report.judgements)} nodes early-stopped by {config.by}: {named(names)}"
    return f"{found}; {_steps(config)} a round instead of {local_steps:,}." if names else f"{found}."


def unchanged_line(local_steps: int, config: EarlyStoppingConfig) -> str:
    """Why early stopping is without effect in a run."""
    fewer = f"an early-stopped node would do {_steps(config)} a round"
    return f"Early stopping changes nothing at T = {local_steps}: {fewer}."


def _steps(config: EarlyStoppingConfig) -> str:
    return f"{config.steps} local {'step' if config.steps == 1 else 'steps'}"


def ratio(value: float) -> str:
    """rho_later for people."""
    return f"{value:.2f}" if math.isfinite(value) else "∞"


def node_columns(report: Report, rows: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Heads, each with a cell a node; columns of which nothing is known are left out.

    Args:
        report: of a run.
        rows: the columns that say what rows the nodes have.
    """
    nodes = report.nodes.values()
    columns = {
        "node": list(report.nodes),
        **rows,
        "updates": [f"{node.updates:,}" for node in nodes],
        "sent": [known(node.sent_bytes, human_bytes) for node in nodes],
        "received": [known(node.received_bytes, human_bytes) for node in nodes],
        "peak memory": [known(node.peak_rss_mib, lambda mib: f"{mib:,.0f} MiB") for node in nodes],
        "weights": [_verdict(report, node) for node in nodes],
    }
    return {head: cells for head, cells in columns.items() if not all(cell.startswith(DASH) for cell in cells)}


def known(value: ValueT | None, shown: Callable[[ValueT], str] = lambda value: f"{value:,}") -> str:
    """A figure, or a dash."""
    return DASH if value is None else shown(value)


def _verdict(report: Report, node: NodeReport) -> str:
    """Whether a node holds the server's theta: at its end, or else at the last version of which that was checked."""
    if node.digest and report.digest:
        return "✓ equal" if node.digest == report.digest else "✗ differs"
    return f"{DASH} not known" if node.proven is None else f"✓ at version {node.proven:,}"


# --- on a terminal ---


def print_summary(console: Console, report: Report) -> None:
    """Print the figures of a run, and its nodes as a table."""
    judged = [(name, report.judgements[name]) for name in report.early_stopped[:MOST_NAMED]]
    rhos = [f"{name}: rho_later {ratio(found.rho_later)}, rho_quiet {found.rho_quiet:.2f}" for name, found in judged]
    counts = [f"{why}: {count:,}" for why, count in sorted(report.counts.items()) if why != "left"]
    said = (
        Headline("warning", report.warning),
        *headlines(report),
        Headline("early stopping", "\n".join([early_stopping_line(report), *rhos])),
        Headline("counted", ", ".join(counts)),
    )
    console.print()
    console.print(pairs(*((each.label.lower(), each.text) for each in said if each.value)))
    if report.nodes:
        console.print()
        columns = node_columns(report, _rows_by_class(report, console.width))
        heads = [
            Column[tuple[str, ...]](head, itemgetter(index), left=head in ("node", "weights"))
            for index, head in enumerate(columns)
        ]
        console.print(FittingTable(heads, zip(*columns.values(), strict=True), most=MOST_NODES))


def _rows_by_class(report: Report, width: int) -> dict[str, list[str]]:
    """A column a class where there is room for them."""
    nodes = report.nodes.values()
    needed = OTHER_COLUMNS_WIDTH + max(map(len, report.nodes)) + sum(max(4, len(name)) + 2 for name in report.classes)
    if needed <= width and all(node.labels for node in nodes):
        return {name: [f"{node.labels[number]:,}" for node in nodes] for number, name in enumerate(report.classes)}
    if all(0 < len(node.labels) <= MOST_CLASSES for node in nodes):
        return {"rows by class": ["/".join(map(str, node.labels)) for node in nodes]}
    return {"rows": [known(node.rows) for node in nodes]}
