"""The demo from nothing to a report: mask, federation, first-order bound, summary."""

import asyncio
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from meerkat_mq.core.files import writing
from meerkat_mq.core.mask import Mask
from meerkat_mq.demo.local import SERVER, LocalResult, node_name, run_local
from meerkat_mq.demo.plan import DemoPlan
from meerkat_mq.engines.evaluate import evaluate, first_order
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import LoadedModel, load_model, set_threads
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.errors import RunMismatch
from meerkat_mq.ledger.sqlite import LEDGER_FILE
from meerkat_mq.mqtt.message import MessageCount
from meerkat_mq.observe.live import Live
from meerkat_mq.observe.logs import configure_logs
from meerkat_mq.observe.measure import ACCURACY, measure_of
from meerkat_mq.observe.page import write_report
from meerkat_mq.observe.report import Facts, NodeFacts, Report
from meerkat_mq.observe.summary import print_summary, unchanged_line
from meerkat_mq.observe.tables import say
from meerkat_mq.server.reporting import PAGE_FILE, read_report
from meerkat_mq.tasks.data import class_counts


async def run_demo(plan: DemoPlan, out: Path, console: Console) -> None:
    """Run the demo and leave everything in `out`, a new folder.

    That is: mask, logs, node folders, server/difference.mkd, report.html.

    Raises:
        ConfigError: `out` cannot be written.
        MeerkatError: a process failed, or a node's digest is not the server's.
    """
    set_threads(max(1, (os.cpu_count() or 1) // 2))  # the nodes work on the others
    config, local_steps = plan.early_stopping, plan.rounds.local_steps
    if config.by != "off" and local_steps <= config.steps:
        say(console, unchanged_line(local_steps, config))
    with writing(f"--out {out}"), await asyncio.to_thread((out / "server.log").open, "x") as log:
        configure_logs(as_json=True, file=log)
        try:
            with Live(console, rounds=plan.rounds.count, nodes=len(plan.shards)) as live:
                report = await _federate(plan, out, live)
        except asyncio.CancelledError:
            if (out / SERVER / LEDGER_FILE).exists():
                say(console, f"The page of what there is: meerkat report {shlex.quote(str(out / SERVER))}")
            raise
    print_summary(console, report)
    say(console, f"Report: {out / PAGE_FILE}")
    if differing := ", ".join(name for name, node in report.nodes.items() if node.digest != report.digest):
        raise RunMismatch(differing, f"did not end at the server's digest {report.digest}", f"see the logs in {out}")


async def _federate(plan: DemoPlan, out: Path, live: Live) -> Report:
    """Every phase; after each, what `meerkat report` makes its page of is on the disk."""
    live.note(f"loading {plan.name}")
    loaded = await asyncio.to_thread(load_model, plan.source)
    for note in loaded.notes:
        live.note(note)
    live.note("scoring the mask")
    mask = await asyncio.to_thread(_make_mask, plan, loaded)
    mask.save(out / "mask.mkm")
    facts = _facts_before(plan, mask, sum(parameter.numel() for parameter in loaded.model.parameters()))
    await asyncio.to_thread(facts.save, out / SERVER)
    live.note(f"starting the broker, the server and {len(plan.shards)} nodes")
    result = await run_local(plan, out, out / "mask.mkm", live)
    facts = _facts_after(facts, result)
    report = await asyncio.to_thread(_leave_page, facts, out)
    if plan.bound:
        live.note("first-order training on the same mask, for comparison (Ctrl-C leaves it out)")
        loop = asyncio.get_running_loop()

        def progress(done: int, total: int) -> None:
            loop.call_soon_threadsafe(live.advance, done, total)

        bound = await asyncio.to_thread(_bound, plan, mask, loaded, progress)
        report = await asyncio.to_thread(_leave_page, replace(facts, bound=bound), out)
    return report


def _leave_page(facts: Facts, out: Path) -> Report:
    """Keep the facts, and make the run's page, as `meerkat report` does."""
    facts.save(out / SERVER)
    report = read_report(out / SERVER)
    write_report(out / PAGE_FILE, report)
    return report


def _make_mask(plan: DemoPlan, loaded: LoadedModel) -> Mask:
    wanted = plan.settings
    return make_mask(
        loaded,
        plan.calibration(),
        density=wanted.density,
        seed=plan.seed,
        sequences=wanted.calibration_sequences,
        length=wanted.calibration_tokens,
    )


def _facts_before(plan: DemoPlan, mask: Mask, parameters: int) -> Facts:
    """What is known before the run starts: the model, and the rows of each node."""
    labels = [class_counts(rows, plan.task) for rows in plan.shards]
    nodes = {node_name(number): NodeFacts(labels=counts) for number, counts in enumerate(labels)}
    return Facts(mask=mask.hash.hex(), model=plan.name, parameters=parameters, covered=mask.covered, nodes=nodes)


def _facts_after(facts: Facts, result: LocalResult) -> Facts:
    """And after it: how it ended, and what each node said last."""
    finished, nodes = result.finished, dict(facts.nodes)
    for name, words in result.node_reports.items():
        updates = finished.updates.get(name, MessageCount())
        nodes[name] = replace(
            nodes[name],
            payload_bytes=updates.payload_bytes,
            packet_bytes=updates.packet_bytes,
            sent_bytes=words.get("sent_bytes"),
            received_bytes=words.get("received_bytes"),
            peak_rss_mib=words.get("peak_rss_mib"),
            digest=words.get("digest") or "",
        )
    return replace(facts, run=result.run, seconds=finished.seconds, nodes=nodes, counts=finished.counts)


def _bound(plan: DemoPlan, mask: Mask, loaded: LoadedModel, progress: Callable[[int, int], None]) -> float:
    engine = TransformersEngine(loaded, mask, plan.task)
    rows = engine.usable([row for shard in plan.shards for row in shard])
    first_order(
        engine,
        mask.theta_0,
        rows,
        steps=plan.settings.bound_steps,
        lr=plan.settings.bound_lr,
        batch_size=2 * plan.rounds.batch_size,
        seed=plan.seed,
        progress=progress,
    )
    figures = evaluate(engine, engine.usable(plan.held_out), figures=plan.task.evaluation).figures
    return figures[(measure_of(figures) or ACCURACY).key]
