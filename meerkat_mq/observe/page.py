"""The report page: one HTML file with everything in it, for a browser or a phone."""

from pathlib import Path

from meerkat_mq.core.files import write_atomically
from meerkat_mq.observe import charts
from meerkat_mq.observe.cards import bytes_card, counts_card, gradip_card, labels_card, nodes_card, run_card
from meerkat_mq.observe.figures import duration, smoothed
from meerkat_mq.observe.markup import Markup, document, section, tag
from meerkat_mq.observe.report import Report, Standing
from meerkat_mq.observe.summary import Headline, headlines

LABEL_GAP = 0.06


def write_report(path: Path, report: Report) -> None:
    """Write the self-contained report page, atomically.

    Raises:
        OSError: the folder is missing, read-only or full.
    """
    warning = tag("p", f"Warning: {report.warning}.", class_="warning", role="alert") if report.warning else ""
    page = document(
        f"{report.model} · Meerkat-MQ", _header(report), warning,
        tag("div", *map(_tile, headlines(report)), class_="tiles"), _curves(report), gradip_card(report),
        bytes_card(report), labels_card(report), nodes_card(report), counts_card(report), run_card(report),
    )  # fmt: skip
    write_atomically(path, page.encode("utf-8", errors="replace"))


def _header(report: Report) -> Markup:
    task = report.descriptor.task
    where = f"federation {report.descriptor.federation} · run {report.descriptor.run[:8]}"
    return tag(
        "header",
        tag("p", "Meerkat-MQ run report", class_="kicker"),
        tag("h1", report.model, tag("span", f" on {task.name}", class_="task") if task else ""),
        tag("p", f"{_lead(report)} · {where} · {report.at[:10]} {report.at[11:16]} UTC", class_="lead"),
    )


def _lead(report: Report) -> str:
    nodes = f"{len(report.nodes):,} {'node' if len(report.nodes) == 1 else 'nodes'}"
    took = f" in {duration(report.seconds)}" if report.seconds is not None else ""
    if report.standing is Standing.FINISHED:
        return f"Fine-tuned by {nodes} over MQTT{took}"
    closed = f"{report.closed:,} of {report.descriptor.count:,} rounds by {nodes} over MQTT{took}"
    return f"{report.standing.value.capitalize()}: {closed}"


def _tile(headline: Headline) -> Markup:
    label, value = tag("p", headline.label, class_="label"), tag("p", headline.value, class_="value")
    return tag("div", label, value, *(tag("p", each, class_="detail") for each in headline.details), class_="tile")


# --- curves ---


def _curves(report: Report) -> Markup:
    rounds = charts.count_scale(max([report.closed, *(found.version for found in report.evaluations)]))
    return tag("div", _measured(report, rounds), _loss(report, rounds), class_="two")


def _measured(report: Report, rounds: charts.Scale) -> Markup:
    measure, label = report.measure, f"Held-out {report.measure.words}"
    if not report.curve:
        return section(label, note="Not measured in this run.")
    curve = charts.Line(measure.words, "main", report.curve, dots=True)
    rows = report.evaluations[-1].rows
    return section(
        label,
        charts.line_chart(
            f"{label} over rounds",
            [curve],
            _references(report),
            rounds,
            lambda value: f"{100 * value:.6g} %" if measure.share else f"{value:.6g}",
            axis="rounds closed",
        ),
        note=f"On {rows:,} rows that no node has seen." if rows else "On rows that no node has seen.",
    )


def _references(report: Report) -> list[charts.Reference]:
    measure, before = report.measure, report.curve[0][1]
    majority = report.evaluations[-1].figures.get("majority")
    marks = [
        ("before", "before", before),
        *([("majority class", "majority", majority)] if majority is not None else []),
    ]
    marks.sort(key=lambda mark: -mark[2])
    high = marks[0][2]
    gap = LABEL_GAP if measure.share else LABEL_GAP * high
    references = [
        charts.Reference(f"{label} {measure.shown(at)}", style, at, below=at < high and high - at < gap)
        for label, style, at in marks
    ]
    if report.bound is not None:
        label = f"first-order bound {measure.shown(report.bound)}"
        references.append(charts.Reference(label, "bound", report.bound, left=True))
    return references


def _loss(report: Report, rounds: charts.Scale) -> Markup:
    numbers, losses = [number for number, _ in report.losses], [loss for _, loss in report.losses]
    average = smoothed(losses, max(5, len(losses) / 15))
    held_out = [(e.version, e.loss) for e in report.evaluations if "loss" in e.figures]
    lines = [
        charts.Line("a round", "raw", list(zip(numbers, losses, strict=True))),
        charts.Line("smoothed", "main", list(zip(numbers, average, strict=True))),
        charts.Line("held-out", "bound", held_out, dots=True),
    ]
    return section(
        "Loss",
        charts.line_chart("Loss over rounds", lines, [], rounds, lambda value: f"{value:.6g}", axis="rounds"),
        charts.legend([(line.label, line.style) for line in lines if line.points]),
        note="Mean over the nodes, each on a batch of its own data.",
    )
