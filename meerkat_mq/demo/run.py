"""The demo from nothing to a report: mask, federation, first-order bound, summary."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import Row
from meerkat_mq.demo.local import LocalFederation, LocalResult, node_name, run_local
from meerkat_mq.demo.plan import Plan
from meerkat_mq.errors import ConfigError, RunMismatch
from meerkat_mq.model.engine import TransformersEngine
from meerkat_mq.model.evaluate import evaluate, first_order
from meerkat_mq.model.load import LoadedModel, load_model
from meerkat_mq.model.masks import make_mask
from meerkat_mq.observe.events import RunEvent, RunStarted
from meerkat_mq.observe.live import Live
from meerkat_mq.observe.logs import configure_logs
from meerkat_mq.observe.page import write_report
from meerkat_mq.observe.report import NodeReport, Report
from meerkat_mq.observe.summary import print_summary, unchanged_line
from meerkat_mq.wire.descriptor import RunDescriptor, Task

EVALUATIONS = 12


async def run_demo(plan: Plan, out: Path, console: Console) -> None:
    """Run the demo and leave everything in `out`: mask, logs, node folders, server/difference.mkd, report.html.

    Raises:
        ConfigError: `out` cannot be written.
        MeerkatError: a process failed, or a node's digest is not the server's.
    """
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # the nodes work on the others
    try:
        await asyncio.to_thread(out.mkdir, parents=True, exist_ok=True)
        configure_logs(as_json=True, file=await asyncio.to_thread((out / "server.log").open, "w"))
        await _run(plan, out, console)
    except OSError as error:
        raise ConfigError(f"--out {out}", f"cannot be written ({error.strerror})", "choose another folder") from error


async def _run(plan: Plan, out: Path, console: Console) -> None:
    started: list[RunDescriptor] = []
    config, local_steps = plan.early_stopping, plan.rounds.local_steps
    if config.by != "off" and local_steps <= config.steps:
        console.print(unchanged_line(local_steps, config), soft_wrap=True, highlight=False)
    with Live(console, rounds=plan.rounds.count, nodes=len(plan.shards)) as live:

        def observe(event: RunEvent) -> None:
            if isinstance(event, RunStarted):
                started.append(event.descriptor)
            live(event)

        live.note(f"loading {plan.name}")
        loaded = await asyncio.to_thread(load_model, plan.source)
        live.note("scoring the mask")
        mask = await asyncio.to_thread(_make_mask, plan, loaded)
        mask.save(out / "mask.mkm")
        live.note(f"starting the broker, the server and {len(plan.shards)} nodes")
        result = await run_local(_federation(plan, out), observe)
        live.note("first-order training on the same mask, for comparison")
        bound = await asyncio.to_thread(_bound, plan, mask, loaded)
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    report = _report(plan, mask, result, descriptor=started[0], parameters=parameters, bound=bound)
    print_summary(console, report)
    await asyncio.to_thread(write_report, out / "report.html", report)
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True, highlight=False)
    _check_digests(report, out)


def _make_mask(plan: Plan, loaded: LoadedModel) -> Mask:
    return make_mask(
        loaded, plan.calibration(), density=plan.density, seed=plan.seed, sequences=plan.sequences, length=plan.length
    )


def _federation(plan: Plan, out: Path) -> LocalFederation:
    return LocalFederation(
        folder=out,
        source=plan.source,
        task=plan.task,
        mask=out / "mask.mkm",
        shards=plan.shards,
        held_out=plan.held_out,
        rounds=plan.rounds,
        early_stopping=plan.early_stopping,
        every=max(1, plan.rounds.count // EVALUATIONS),
        dtype=plan.dtype,
    )


def _bound(plan: Plan, mask: Mask, loaded: LoadedModel) -> float:
    engine = TransformersEngine(loaded, mask, plan.task)
    rows = engine.usable([row for shard in plan.shards for row in shard])
    first_order(
        engine,
        mask.theta_0,
        rows,
        steps=plan.first_order_steps,
        lr=plan.first_order_lr,
        batch_size=2 * plan.rounds.batch_size,
        seed=plan.seed,
    )
    return evaluate(engine, engine.usable(plan.held_out)).accuracy


def _report(
    plan: Plan, mask: Mask, result: LocalResult, *, descriptor: RunDescriptor, parameters: int, bound: float
) -> Report:
    finished = result.finished
    assert finished is not None
    nodes = {
        name: _node_report(plan.task, rows, result, name)
        for name, rows in ((node_name(number), rows) for number, rows in enumerate(plan.shards))
    }
    return Report(
        descriptor=descriptor,
        model=plan.name,
        parameters=parameters,
        classes=[word.strip() for word in plan.task.label_words],
        rounds=result.rounds,
        evaluations=result.evaluations,
        nodes=nodes,
        digest=finished.digest,
        bound=bound,
        seconds=finished.seconds,
        counts=finished.counts,
        covered=mask.covered,
        magnitudes=result.paths.magnitudes,
        judgements=result.paths.judgements,
        early_stopping=plan.early_stopping,
    )


def _node_report(task: Task, rows: Sequence[Row], result: LocalResult, name: str) -> NodeReport:
    words: dict[str, Any] = result.node_reports[name]
    assert result.finished is not None
    updates = result.finished.updates[name]

    def packets(direction: str) -> int:
        return sum(int(count["packet_bytes"]) for count in words.get(direction, {}).values())

    return NodeReport(
        labels=[sum(row[task.label_field] == label for row in rows) for label in range(len(task.label_words))],
        updates=updates.messages,
        payload_bytes=updates.payload_bytes,
        packet_bytes=updates.packet_bytes,
        sent_bytes=packets("sent"),
        received_bytes=packets("received"),
        peak_rss_mib=float(words.get("peak_rss_mib", 0.0)),
        digest=str(words.get("digest", "")),
    )


def _check_digests(report: Report, out: Path) -> None:
    differing = [name for name, node in report.nodes.items() if node.digest != report.digest]
    if differing:
        raise RunMismatch(
            ", ".join(differing), f"did not end at the server's digest {report.digest}", f"see the logs in {out}"
        )
