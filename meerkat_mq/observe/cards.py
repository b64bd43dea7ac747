"""The cards of a report page below its curves: virtual paths, bytes, data, nodes, counts, and the run itself."""

import math
from collections.abc import Iterable
from typing import Final

from meerkat_mq.core.metrics import meaning
from meerkat_mq.observe import charts, summary
from meerkat_mq.observe.figures import human_bytes, smoothed
from meerkat_mq.observe.markup import Markup, pairs, section, table, tag
from meerkat_mq.observe.report import Report

LEGEND_CLASSES: Final = 16


# --- GradIP ---


def gradip_card(report: Report) -> Markup:
    """Virtual paths, and what early stopping made of them; nothing where there is nothing to see."""
    if report.magnitudes and report.descriptor.local_steps > 1:
        content = [*_gradip_chart(report), _judgements(report)]
        return section("GradIP: ⟨pre-training gradient, local step⟩", *content, note=_what_to_see(report))
    if report.early_stopping.by != "off":
        return section("Early stopping", _judgements(report), note=summary.early_stopping_line(report))
    return Markup()


def _gradip_chart(report: Report) -> Iterable[Markup]:
    longest, stopped = _longest(report), set(report.early_stopped)
    drawn = sorted(report.magnitudes, key=lambda name: name not in stopped)[:LEGEND_CLASSES]
    lines = [_gradip_line(report, name, charts.colour(index, "n")) for index, name in enumerate(drawn)]
    yield charts.line_chart(
        "GradIP over local steps",
        lines[::-1],  # the early-stopped ones above the others
        [],
        charts.count_scale(longest),
        lambda power: f"{10**power:.2g}",
        axis=f"{'local steps' if report.descriptor.perturbations == 1 else 'projected gradients'} of the node",
        bands=_calibration(report),
    )
    yield charts.legend([(line.label, line.style) for line in lines], len(report.magnitudes) - len(lines))


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
    return " ".join([*sentences, summary.early_stopping_line(report)])


def _judgements(report: Report) -> Markup:
    if not report.judgements:
        return Markup()
    config = report.early_stopping
    least = (f" (≥ {config.rho_later:g})", f" (≥ {config.rho_quiet:g})") if config.by == "vpcs" else ("", "")
    heads = ["node", f"rho_later{least[0]}", f"rho_quiet{least[1]}", "round", f"verdict by {config.by}"]
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


def bytes_card(report: Report) -> Markup:
    """What the node with the most traffic sent and received, against weights."""
    cost = report.cost
    if cost is None or not cost.node.sent_bytes:
        return Markup()
    sizes = [
        (f"all weights{cost.both}, each round", "weights", cost.weights),
        (f"only the masked values{cost.both}, each round", "masked", cost.masked),
        ("sent: updates, payload", "main", cost.node.payload_bytes),
        ("sent: updates as MQTT packets", "main", cost.node.packet_bytes),
        ("sent: everything", "main", cost.node.sent_bytes),
        ("received: everything, the mask too", "received", cost.node.received_bytes),
    ]
    bars = [charts.Bar(label, style, size, human_bytes(size)) for label, style, size in sizes if size is not None]
    first = "The first two are" if cost.weights is not None else "The first is"
    return section(
        "Bytes of one node",
        charts.log_bars(bars, _bytes_tick),
        note=f"The node with the most, over {cost.updates:,} rounds; log scale. {first} what sending weights "
        f"({report.descriptor.dtype}) or masked values (float32) as often would take.",
    )


def _bytes_tick(size: float) -> str:
    number, unit = human_bytes(size).split(" ")
    return f"{float(number):g} {unit}"


def labels_card(report: Report) -> Markup:
    """Rows of each class on each node; nothing where they are not known."""
    known = {name: node for name, node in report.nodes.items() if node.labels}
    if not known:
        return Markup()
    most = max(sum(node.labels) for node in known.values())
    rows = (
        tag("div", tag("span", name, class_="name"),
            charts.stacked_bar(f"Rows of {name} by class", list(zip(report.classes, node.labels, strict=False)), most),
            tag("span", f"{sum(node.labels):,}", class_="sum"), class_="share")
        for name, node in known.items()
    )  # fmt: skip
    entries = [(name, charts.colour(index)) for index, name in enumerate(report.classes)]
    return section(
        "Data on the nodes",
        charts.legend(entries[:LEGEND_CLASSES], max(0, len(entries) - LEGEND_CLASSES)),
        tag("div", *rows, class_="shares"),
        note="Rows of each class; a row never leaves its node.",
    )


def nodes_card(report: Report) -> Markup:
    """A line a node."""
    if not report.nodes:
        return section("Nodes", note="No node was seen yet.")
    columns = summary.node_columns(report, {"rows": [summary.known(node.rows) for node in report.nodes.values()]})
    return section("Nodes", table(list(columns), zip(*columns.values(), strict=True)))


def counts_card(report: Report) -> Markup:
    """What happened, and what it means."""
    if not report.counts:
        return section("Counted", note="Nothing: no update late, refused or twice, no node lost, no message dropped.")
    rows = ((reason, f"{count:,}", meaning(reason)) for reason, count in sorted(report.counts.items()))
    return section("Counted", table(["what", "times", "meaning"], rows), style="card counts")


# --- the run itself ---


def run_card(report: Report) -> Markup:
    """Settings and hashes."""
    run = report.descriptor
    settings = [
        ("rounds", f"{run.count:,}"),
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
        *([("weights at the newest digest", report.digest)] if report.digest else []),
    ]
    return section("The run", pairs(settings, "settings"), pairs(hashes, "hashes"), _task(report))


def _task(report: Report) -> Markup:
    """What the run descriptor says of its task, key by key."""
    task = report.descriptor.task
    if task is None:
        return Markup()
    shown = {
        "task" if key == "name" else key.replace("_", " "): value if isinstance(value, list | tuple) else [value]
        for key, value in task.model_dump().items()
    }
    return pairs([(key, " · ".join(str(item).strip() for item in values)) for key, values in shown.items()], "hashes")
