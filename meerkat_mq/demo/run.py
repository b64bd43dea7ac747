"""The demo from nothing to a report: mask, federation, first-order bound, summary."""

import asyncio
import os
import shlex
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from meerkat_mq.core.mask import Mask
from meerkat_mq.demo.facts import facts_after, facts_before
from meerkat_mq.demo.local import SERVER, LocalFederation, run_local
from meerkat_mq.demo.plan import DemoPlan
from meerkat_mq.engines.evaluate import evaluate, first_order
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import LoadedModel, load_model, set_threads
from meerkat_mq.engines.torch.masks import make_mask
from meerkat_mq.errors import ConfigError, RunMismatch
from meerkat_mq.ledger.sqlite import LEDGER_FILE
from meerkat_mq.observe.facts import Facts
from meerkat_mq.observe.live import Live
from meerkat_mq.observe.logs import configure_logs
from meerkat_mq.observe.page import write_report
from meerkat_mq.observe.report import Report
from meerkat_mq.observe.summary import print_summary, unchanged_line
from meerkat_mq.observe.tables import say
from meerkat_mq.server.reporting import PAGE_FILE, read_report

EVALUATIONS = 12


async def run_demo(plan: DemoPlan, out: Path, console: Console) -> None:
    """Run the demo and leave everything in `out`, a new folder.

    That is: mask, logs, node folders, server/difference.mkd, report.html.

    Raises:
        ConfigError: `out` cannot be written.
        MeerkatError: a process failed, or a node's digest is not the server's.
    """
    set_threads(max(1, (os.cpu_count() or 1) // 2))  # the nodes work on the others
    try:
        configure_logs(as_json=True, file=await asyncio.to_thread((out / "server.log").open, "x"))
        await _run(plan, out, console)
    except OSError as error:
        raise ConfigError(f"--out {out}", f"cannot be written ({error.strerror})", "choose another folder") from error


async def _run(plan: DemoPlan, out: Path, console: Console) -> None:
    config, local_steps = plan.early_stopping, plan.rounds.local_steps
    if config.by != "off" and local_steps <= config.steps:
        console.print(unchanged_line(local_steps, config), soft_wrap=True, highlight=False)
    try:
        with Live(console, rounds=plan.rounds.count, nodes=len(plan.shards)) as live:
            report = await _federate(plan, out, live)
    except asyncio.CancelledError:
        if (out / SERVER / LEDGER_FILE).exists():
            say(console, f"The page of what there is: meerkat report {shlex.quote(str(out / SERVER))}")
        raise
    print_summary(console, report)
    say(console, f"Report: {out / PAGE_FILE}")
    _check_digests(report, out)


async def _federate(plan: DemoPlan, out: Path, live: Live) -> Report:
    """Every phase; after each, what `meerkat report` makes its page of is on the disk."""
    live.note(f"loading {plan.name}")
    loaded = await asyncio.to_thread(load_model, plan.source)
    for note in loaded.notes:
        live.note(note)
    live.note("scoring the mask")
    mask = await asyncio.to_thread(_make_mask, plan, loaded)
    mask.save(out / "mask.mkm")
    facts = facts_before(plan, mask, sum(parameter.numel() for parameter in loaded.model.parameters()))
    live.note(f"starting the broker, the server and {len(plan.shards)} nodes")
    result = await run_local(_federation(plan, out, facts), live)
    facts = facts_after(facts, plan, result)
    report = await asyncio.to_thread(_leave_page, facts, out)
    if plan.bound:
        live.note("first-order training on the same mask, for comparison (Ctrl-C leaves it out)")
        loop = asyncio.get_running_loop()

        def progress(done: int, total: int) -> None:
            loop.call_soon_threadsafe(live.advance, done, total)

        bound = await asyncio.to_thread(_bound, plan, mask, loaded, progress)
        report = await asyncio.to_thread(_leave_page, facts.model_copy(update={"bound": bound}), out)
    return report


def _leave_page(facts: Facts, out: Path) -> Report:
    """Keep the facts, and make the run's page, as `meerkat report` does."""
    facts.save(out / SERVER)
    report = read_report(out / SERVER)
    write_report(out / PAGE_FILE, report)
    return report


def _make_mask(plan: DemoPlan, loaded: LoadedModel) -> Mask:
    return make_mask(
        loaded, plan.calibration(), density=plan.density, seed=plan.seed, sequences=plan.sequences, length=plan.length
    )


def _federation(plan: DemoPlan, out: Path, facts: Facts) -> LocalFederation:
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
        facts=facts,
    )


def _bound(plan: DemoPlan, mask: Mask, loaded: LoadedModel, progress: Callable[[int, int], None]) -> float:
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
        progress=progress,
    )
    return evaluate(engine, engine.usable(plan.held_out)).accuracy


def _check_digests(report: Report, out: Path) -> None:
    differing = [name for name, node in report.nodes.items() if node.digest != report.digest]
    if differing:
        raise RunMismatch(
            ", ".join(differing), f"did not end at the server's digest {report.digest}", f"see the logs in {out}"
        )
