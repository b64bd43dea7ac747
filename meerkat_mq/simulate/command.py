"""`meerkat simulate`: thousands of fault schedules, on all cores, judged; one of them, told in full."""

import gc
import math
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from meerkat_mq.errors import DrillFailed
from meerkat_mq.observe.signals import Interrupted
from meerkat_mq.simulate.checkers import CHECKERS, Violation
from meerkat_mq.simulate.history import History
from meerkat_mq.simulate.reached import ENOUGH, LIVENESS, REACHED, missing
from meerkat_mq.simulate.run import judge
from meerkat_mq.simulate.schedule import Schedule, make_schedule
from meerkat_mq.simulate.shrink import shrink

CHUNK = 50
EXAMPLES = 3
GARBAGE = 50_000  # objects between two looks for cycles, of which schedules make few: 5 % less CPU time


@dataclass(slots=True)
class Tally:
    """What a number of schedules came to.

    Attributes:
        reached: what was met, by name.
        failed: first violation of each seed that has one.
    """

    schedules: int = 0
    rounds: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    reached: Counter[str] = field(default_factory=Counter)
    violations: Counter[str] = field(default_factory=Counter)
    failed: dict[int, Violation] = field(default_factory=dict)

    def add(self, other: "Tally") -> None:
        """Take another tally in."""
        self.schedules += other.schedules
        self.rounds += other.rounds
        self.faults += other.faults
        self.reached += other.reached
        self.violations += other.violations
        self.failed |= other.failed


def tally(seeds: Sequence[int], *, liveness: bool = False) -> Tally:
    """Run the schedules of some seeds."""
    made = Tally()
    for seed in seeds:
        schedule = make_schedule(seed, liveness=liveness)
        history, found = judge(schedule)
        made.schedules += 1
        made.rounds += len(history.entries)
        made.faults.update(fault.name for fault in history.faults)
        made.reached.update(history.reached)
        made.violations.update({violation.checker for violation in found})
        if found:
            made.failed[seed] = found[0]
    return made


def simulate(first: int, schedules: int, console: Console, *, liveness: bool = False) -> Tally:
    """Run the schedules of `schedules` seeds from `first` on, on all cores; an interrupt ends them at once."""
    chunks = [range(start, min(start + CHUNK, first + schedules)) for start in range(first, first + schedules, CHUNK)]
    workers, context = os.cpu_count() or 1, multiprocessing.get_context("spawn")
    total = Tally()
    with (
        Progress(
            TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        ) as bar,
        ProcessPoolExecutor(workers, context, gc.set_threshold, (GARBAGE,)) as pool,
    ):  # fmt: skip
        task = bar.add_task("simulating", total=schedules)
        try:
            for part in _submitted(pool, chunks, liveness):
                total.add(part.result())
                bar.update(task, completed=total.schedules)
        except BaseException:  # the pool would wait for its workers
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
    return total


def _submitted(pool: ProcessPoolExecutor, chunks: Sequence[range], liveness: bool) -> list[Future[Tally]]:
    """Workers start here, deaf to Ctrl-C, which a terminal sends to them too; here it waits meanwhile."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        # `map` would cancel them, which a dying pool reports
        return [pool.submit(tally, chunk, liveness=liveness) for chunk in chunks]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def command(
    schedules: Annotated[int, typer.Option(min=1, help="How many fault schedules to run.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first one.")] = 0,
    repeat: Annotated[int | None, typer.Option(min=0, help="Run the schedule of this seed alone, and tell it.")] = None,
    liveness: Annotated[bool, typer.Option("--liveness", help="Some faults never heal: runs must still end.")] = False,
) -> None:
    """Run whole federations on a virtual clock under random faults, and check what must hold of each."""
    try:
        _command(schedules, seed, repeat, liveness=liveness)
    except Interrupted as signal:
        Console().print(signal.word)
        raise typer.Exit(signal.exit_code) from None


def _command(schedules: int, seed: int, repeat: int | None, *, liveness: bool) -> None:
    console = Console()
    if repeat is not None:
        _tell(make_schedule(repeat, liveness=liveness), console)
        return
    total = simulate(seed, schedules, Console(stderr=True), liveness=liveness)
    _print_tally(total, console)
    expected = (*REACHED, *LIVENESS) if liveness else REACHED
    never = missing(total.reached, expected)
    console.print(
        f"{len(expected) - len(never)} of {len(expected)} reachability counters are above zero", highlight=False
    )
    for failed in sorted(total.failed)[:EXAMPLES]:
        _print_failure(make_schedule(failed, liveness=liveness), console)
    if total.failed:
        raise DrillFailed(
            "simulation", f"{len(total.failed)} of {total.schedules} schedules ended with a violation", "see above"
        )
    if never and total.schedules >= ENOUGH:
        raise DrillFailed("simulation", f"never met: {', '.join(never)}", "let schedules lead there again")


def _print_tally(total: Tally, console: Console) -> None:
    console.print(f"{total.schedules:,} schedules, {total.rounds:,} rounds", highlight=False)
    checkers = dict.fromkeys([*CHECKERS, *total.violations])
    for names, counts in (
        (("fault", "struck"), total.faults.most_common()),
        (("what must hold", "schedules that violate it"), [(name, total.violations[name]) for name in checkers]),
    ):
        table = Table()
        table.add_column(names[0])
        table.add_column(names[1], justify="right")
        for name, number in counts:
            table.add_row(name, f"{number:,}")
        console.print(table)


def _print_failure(schedule: Schedule, console: Console) -> None:
    checkers = {violation.checker for violation in judge(schedule)[1]}
    least = shrink(schedule, lambda smaller: bool(checkers & {found.checker for found in judge(smaller)[1]}))
    seed, mode = schedule.seed, " --liveness" * any(fault.lasts == math.inf for fault in schedule.faults)
    console.print(f"\nseed {seed}; meerkat simulate --repeat {seed}{mode}", highlight=False)
    for violation in judge(least)[1]:
        console.print(f"  {violation.checker}: {violation.where} {violation.problem}", highlight=False, markup=False)
    console.print(f"the least schedule that fails like this:\n{least.encode()}", highlight=False, markup=False)


def _tell(schedule: Schedule, console: Console) -> None:
    history, found = judge(schedule)
    console.print(schedule.encode(), highlight=False, markup=False)
    for time, what in sorted(_told(history), key=itemgetter(0)):
        console.print(f"{time:9.3f}  {what}", highlight=False, markup=False, soft_wrap=True)
    if found:
        _print_failure(schedule, console)
        raise DrillFailed(f"seed {schedule.seed}", f"{len(found)} violations", "see the history above")
    console.print(f"all that must hold, holds: {', '.join(CHECKERS)}", highlight=False)


def _told(history: History) -> Iterator[tuple[float, str]]:
    """What happened, a line each, with its time."""
    for fault in history.faults:
        lasts = "for good" if fault.ended == math.inf else f"{fault.ended - fault.began:.3f} s"
        yield fault.began, f"fault    {fault.name} on {fault.target}, {lasts}"
    for time, version in history.backups:
        yield time, f"restore  of a backup with {version} entries"
    for time, state in history.states:
        yield time, f"state    {state.status}, term {state.term}, server {state.server_id[:4]}"
    for time, frame in history.rounds:
        slots = f"asked {sorted(frame.asked)}, heard {sorted(frame.heard)}"
        yield time, f"round    {frame.header.version} of term {frame.header.term}: {slots}"
    for time, node, update in history.updates:
        at = f"round {update.header.version} of term {update.header.term}"
        made = f"values {update.values.blob.hex()[:8]}" if update.values else f"g {update.scalars}"
        yield time, f"update   {node} boot {update.boot}: {at}, {made}"
