"""The report page: one HTML file with everything in it, for a browser or a phone."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from meerkat_mq.core.files import write_atomically
from meerkat_mq.observe import charts, summary
from meerkat_mq.observe.figures import (
    duration,
    human_bytes,
    human_factor,
    percent,
    points,
    small_percent,
    smoothed,
)
from meerkat_mq.observe.layout import document, section, table
from meerkat_mq.observe.markup import Markup, tag
from meerkat_mq.observe.report import NodeReport, Report

LEGEND_CLASSES: Final = 16
LABEL_GAP: Final = 0.06

MEANINGS: Final = {
    "late": "an update for a round that had closed already; dropped",
    "early": "an update for a round that had not opened yet; dropped",
    "duplicate": "an update that had come before; used once",
    "not asked": "an update of a node that this round had not asked",
    "of another run": "a message of another run; dropped",
    "of another term": "a message to an earlier server of this run; dropped",
    "refused": "an update that does not fit the server's theta or the round; the node was told",
    "died": "a node's connection broke while it was online",
    "left": "a node said goodbye in order",
    "late death": "the end of a connection that had been replaced already; without effect",
    "round extended": "a round's deadline doubled, since too few nodes were heard",
    "no slot left": "a node too many for the round's bitmap; turned away",
    "unexpected answer": "a step of the server that came out of turn; ignored",
    "undecodable": "bytes that are no message of this protocol; dropped",
    "misplaced": "a message on a topic where it does not belong; dropped",
}


def write_report(path: Path, report: Report) -> None:
    """Write the self-contained report page, atomically.

    Raises:
        OSError: the folder is missing, read-only or full.
    """
    write_atomically(path, render(report).encode("utf-8", errors="replace"))


def render(report: Report) -> str:
    """The page as HTML."""
    title = f"{report.model} · Meerkat-MQ"
    return document(
        title, _header(report), _tiles(report), _curves(report), _gradip(report), _bytes(report), _labels(report),
        _nodes(report), _counts(report), _descriptor(report),
    )  # fmt: skip


def _header(report: Report) -> Markup:
    task = report.descriptor.task
    nodes = f"{len(report.nodes):,} {'node' if len(report.nodes) == 1 else 'nodes'}"
    where = f"federation {report.descriptor.federation} · run {report.descriptor.run[:8]}"
    return tag(
        "header",
        tag("p", "Meerkat-MQ run report", class_="kicker"),
        tag("h1", report.model, tag("span", f" on {task.name}", class_="task") if task else ""),
        tag("p", f"Fine-tuned by {nodes} over MQTT in {duration(report.seconds)} · {where}", class_="lead"),
    )


def _tiles(report: Report) -> Markup:
    return tag("div", *(_tile(*tile) for tile in _headlines(report)), class_="tiles")


def _tile(label: str, value: str, *details: str) -> Markup:
    shown = (tag("p", detail, class_="detail") for detail in details)
    return tag("div", tag("p", label, class_="label"), tag("p", value, class_="value"), *shown, class_="tile")


def _headlines(report: Report) -> Iterable[Sequence[str]]:
    if report.evaluations and report.gained is not None:
        before, after = report.evaluations[0], report.evaluations[-1]
        yield (
            "Held-out accuracy", percent(after.accuracy),
            f"{points(report.gained)}, from {percent(before.accuracy)}", f"majority class {percent(after.majority)}",
        )  # fmt: skip
    if report.gap_closed is not None and report.bound is not None:
        yield (
            "Of the gap closed", percent(report.gap_closed, 0),
            f"first-order training on the same mask reaches {percent(report.bound)}",
        )  # fmt: skip
    cost = report.cost
    yield (
        "Sent by a node", human_bytes(cost.packets),
        f"instead of {human_bytes(cost.weights)} for all weights:", f"{human_factor(cost.saving(cost.weights))} × less",
    )  # fmt: skip
    tuned = report.descriptor.weights
    yield (
        "Weights tuned", f"{tuned:,}",
        f"{small_percent(tuned / max(1, report.parameters))} of all {report.parameters:,}",
        *([f"{small_percent(tuned / report.covered)} of the masked matrices"] if report.covered else []),
    )  # fmt: skip
    yield ("Training time", duration(report.seconds), f"{len(report.rounds):,} rounds", *summary.pace(report))
    equal = len(report.nodes) - len(report.astray)
    sign = "✗" if report.astray else "✓"
    yield ("Same as the server", f"{sign} {equal} of {len(report.nodes)}", "nodes end with its weights,", "bit for bit")


# --- curves ---


def _curves(report: Report) -> Markup:
    rounds = charts.count_scale(max([len(report.rounds), *(event.version for event in report.evaluations)]))
    return tag("div", _accuracy(report, rounds), _loss(report, rounds), class_="two")


def _accuracy(report: Report, rounds: charts.Scale) -> Markup:
    if not report.evaluations:
        return section("Held-out accuracy", note="Not measured in this run.")
    curve = charts.Line("accuracy", "main", [(e.version, e.accuracy) for e in report.evaluations], dots=True)
    return section(
        "Held-out accuracy",
        charts.line_chart("Held-out accuracy over rounds", [curve], _references(report), rounds, _percent_tick),
        tag("p", "rounds", class_="axis"),
        note=f"On {report.evaluations[-1].rows:,} rows that no node has seen.",
    )


def _references(report: Report) -> list[charts.Reference]:
    before, majority = report.evaluations[0].accuracy, report.evaluations[-1].majority
    marks = [("before", "before", before), ("majority class", "majority", majority)]
    (high_label, high_style, high), (low_label, low_style, low) = sorted(marks, key=lambda mark: -mark[2])
    references = [
        charts.Reference(f"{high_label} {percent(high)}", high_style, high),
        charts.Reference(f"{low_label} {percent(low)}", low_style, low, below=high - low < LABEL_GAP),
    ]
    if report.bound is not None:
        label = f"first-order bound {percent(report.bound)}"
        references.append(charts.Reference(label, "bound", report.bound, left=True))
    return references


def _loss(report: Report, rounds: charts.Scale) -> Markup:
    closed = [event for event in report.rounds if math.isfinite(event.loss)]
    numbers, losses = [event.round for event in closed], [event.loss for event in closed]
    average = smoothed(losses, max(5, len(losses) / 15))
    held_out = [(e.version, e.loss) for e in report.evaluations if math.isfinite(e.loss)]
    lines = [
        charts.Line("a round", "raw", list(zip(numbers, losses, strict=True))),
        charts.Line("smoothed", "main", list(zip(numbers, average, strict=True))),
        charts.Line("held-out", "bound", held_out, dots=True),
    ]
    return section(
        "Loss",
        charts.line_chart("Loss over rounds", lines, [], rounds, lambda value: f"{value:.6g}"),
        tag("p", "rounds", class_="axis"),
        charts.legend([(line.label, line.style) for line in lines if line.points]),
        note="Mean over the nodes, each on a batch of its own data.",
    )


def _percent_tick(share: float) -> str:
    return f"{100 * share:.6g} %"


def _bytes_tick(size: float) -> str:
    number, unit = human_bytes(size).split(" ")
    return f"{float(number):g} {unit}"


# --- GradIP ---


def _gradip(report: Report) -> Markup:
    if report.magnitudes:
        content = [*_gradip_chart(report), _judgements(report)]
        return section("GradIP: ⟨pre-training gradient, local step⟩", *content, note=_what_to_see(report))
    if report.judgements:
        return section("Early stopping", _judgements(report), note=_early_stopping(report))
    return Markup()


def _gradip_chart(report: Report) -> Iterable[Markup]:
    longest, stopped = _longest(report), set(report.early_stopped)
    drawn = sorted(report.magnitudes, key=lambda name: name not in stopped)[:LEGEND_CLASSES]
    lines = [_gradip_line(report, name, charts.colour(index)) for index, name in enumerate(drawn)]
    yield charts.line_chart(
        "GradIP over local steps",
        lines[::-1],  # the early-stopped ones above the others
        [],
        charts.count_scale(longest),
        lambda power: f"{10**power:.2g}",
        bands=_calibration(report),
    )
    unit = "local steps" if report.descriptor.perturbations == 1 else "projected gradients"
    yield tag("p", f"{unit} of the node", class_="axis")
    more = len(report.magnitudes) - len(drawn)
    entries = [(line.label, line.style) for line in lines]
    yield charts.legend([*entries, (f"… and {more:,} more", "none")] if more else entries)


def _gradip_line(report: Report, name: str, style: str) -> charts.Line:
    """Its magnitude on a log scale, smoothed; what is zero cannot be drawn."""
    points = report.magnitudes[name]
    span = points[0][0] if points else 1
    sizes = smoothed((size for _, size in points), _smoothed_steps(report) / span)
    drawn = [(step, math.log10(size)) for (step, _), size in zip(points, sizes, strict=True) if size > 0]
    stopped = name in report.early_stopped
    return charts.Line(f"{name}: early-stopped" if stopped else name, f"{style} stopped" if stopped else style, drawn)


def _longest(report: Report) -> int:
    return max((int(points[-1][0]) for points in report.magnitudes.values() if points), default=1)


def _smoothed_steps(report: Report) -> int:
    return max(5, _longest(report) // 20)


def _calibration(report: Report) -> list[charts.Band]:
    """The steps of the first round, where it calibrated."""
    if all(judgement.version for judgement in report.judgements.values()):
        return []
    end = report.early_stopping.calibration_steps * report.descriptor.perturbations
    return [charts.Band("calibration", "calibration", 0, min(end, _longest(report)))]


def _what_to_see(report: Report) -> str:
    sentences = [
        f"Magnitude at each local step, mean over about {_smoothed_steps(report)} steps, log scale.",
        "A node whose data is extremely skewed has soon learnt its few labels.",
        "Over many local steps in a row its line sinks towards 0, where the others keep their level.",
    ]
    if report.judgements:
        sentences += [
            "Calibration is grey, early-stopped nodes are dashed.",
            "A new round starts from the common weights, so there a line that sank is up again.",
        ]
    return " ".join([*sentences, _early_stopping(report)])


def _early_stopping(report: Report) -> str:
    config, stopped = report.early_stopping, len(report.early_stopped)
    if config.by == "off":
        return ""
    if not report.judgements:
        return summary.unchanged_line(report.descriptor.local_steps, config)
    steps = f"{config.steps} local {'step' if config.steps == 1 else 'steps'}"
    instead = f"{steps} a round instead of {report.descriptor.local_steps:,}"
    return f"{stopped} of {len(report.judgements)} nodes early-stopped: {instead}."


def _judgements(report: Report) -> Markup:
    if not report.judgements:
        return Markup()
    config = report.early_stopping
    least = (f" (≥ {config.rho_later:g})", f" (≥ {config.rho_quiet:g})") if config.by == "vpcs" else ("", "")
    heads = ["node", f"rho_later{least[0]}", f"rho_quiet{least[1]}", "ledger entry", f"verdict by {config.by}"]
    rows = (
        [
            name,
            summary.ratio(found.rho_later),
            f"{found.rho_quiet:.2f}",
            f"{found.version:,}",
            "✗ early-stopped" if found.early_stopped else "✓ all local steps",
        ]
        for name, found in sorted(report.judgements.items())
    )
    return table(heads, rows)


# --- bytes, labels, nodes ---


def _bytes(report: Report) -> Markup:
    cost, nodes = report.cost, report.nodes.values()
    sizes = [
        ("all weights, each round", "weights", cost.weights),
        ("only the masked values, each round", "masked", cost.masked),
        ("sent: updates, payload", "main", cost.payload),
        ("sent: updates as MQTT packets", "main", cost.packets),
        ("sent: everything", "main", max((node.sent_bytes for node in nodes), default=0)),
        ("received: everything, the mask too", "received", max((node.received_bytes for node in nodes), default=0)),
    ]
    bars = [charts.Bar(label, style, size, human_bytes(size)) for label, style, size in sizes]
    return section(
        "Bytes of one node",
        charts.log_bars(bars, _bytes_tick),
        note=f"The node with the most, over {cost.updates:,} rounds; log scale. The first two are what sending weights "
        f"({report.descriptor.dtype}) or masked values (float32) as often would take.",
    )


def _labels(report: Report) -> Markup:
    most = max((sum(node.labels) for node in report.nodes.values()), default=0)
    rows = (
        tag("div", tag("span", name, class_="name"),
            charts.stacked_bar(f"Rows of {name} by class", _parts(report, node), most),
            tag("span", f"{sum(node.labels):,}", class_="sum"), class_="share")
        for name, node in report.nodes.items()
    )  # fmt: skip
    entries = [(name, charts.colour(index)) for index, name in enumerate(report.classes)]
    if len(entries) > LEGEND_CLASSES:
        entries = [*entries[:LEGEND_CLASSES], (f"… and {len(entries) - LEGEND_CLASSES} more", "none")]
    return section(
        "Data on the nodes",
        charts.legend(entries),
        tag("div", *rows, class_="shares"),
        note="Rows of each class; a row never leaves its node.",
    )


def _parts(report: Report, node: NodeReport) -> list[tuple[str, float]]:
    return list(zip(report.classes, node.labels, strict=False))


def _nodes(report: Report) -> Markup:
    heads = ["node", *report.classes, "updates", "payload", "packets", "all sent", "received", "peak RSS", "digest"]
    rows = (
        [
            name,
            *(f"{count:,}" for count in node.labels),
            f"{node.updates:,}",
            *map(human_bytes, (node.payload_bytes, node.packet_bytes, node.sent_bytes, node.received_bytes)),
            f"{node.peak_rss_mib:,.0f} MiB",
            summary.verdict(node.digest, report.digest),
        ]
        for name, node in report.nodes.items()
    )
    return section("Nodes", table(heads, rows), note=f"At the end, {summary.digest_line(report)}.")


def _counts(report: Report) -> Markup:
    if not report.counts:
        return section("Counted", note="Nothing: no update late, refused or twice, no node lost, no message dropped.")
    rows = ((reason, f"{count:,}", _meaning(reason)) for reason, count in sorted(report.counts.items()))
    return section("Counted", table(["what", "times", "meaning"], rows), style="card counts")


def _meaning(reason: str) -> str:
    return MEANINGS.get(reason.partition(":")[0], "")


# --- the run itself ---


def _descriptor(report: Report) -> Markup:
    run = report.descriptor
    settings = [
        ("rounds", f"{run.rounds:,}"),
        ("local steps T", f"{run.local_steps}"),
        ("directions P", f"{run.directions}"),
        ("learning rate", f"{run.lr:g}"),
        ("perturbation ε", f"{run.eps:g}"),
        ("batch size", f"{run.batch_size}"),
        ("dtype", run.dtype),
        ("stream of directions", run.stream),
        ("digest every", f"{run.digest_every} rounds"),
        ("mask", f"{run.weights:,} weights, {human_bytes(run.mask_bytes)}"),
        ("engine", run.engine),
    ]
    hashes = [
        ("run", run.run),
        ("mask", run.mask),
        ("base weights", run.fingerprint),
        ("tokenizer", run.tokenizer),
        ("final weights", report.digest),
    ]
    return section("The run", _pairs(settings, "settings"), _pairs(hashes, "hashes"), _task(report))


def _pairs(pairs: Iterable[tuple[str, str]], style: str) -> Markup:
    return tag("dl", *(tag("div", tag("dt", label), tag("dd", value)) for label, value in pairs), class_=style)


def _task(report: Report) -> Markup:
    task = report.descriptor.task
    if task is None:
        return Markup()
    pairs = [
        ("task", task.name),
        ("template", task.template),
        ("label words", " · ".join(word.strip() for word in task.label_words)),
        ("text for an encoder", task.text),
        ("label descriptions", " · ".join(task.descriptions)),
    ]
    return _pairs(pairs, "hashes")
