"""What a drill found: which faults struck, how long recovery took, what held."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from rich.console import Console
from rich.table import Table
from rich.text import Text

from meerkat_mq.errors import printable
from meerkat_mq.observe.figures import DASH, duration
from meerkat_mq.simulate.checkers import Violation
from meerkat_mq.simulate.history import Injected

MOST_VIOLATIONS = 20


@dataclass(frozen=True)
class Struck:
    """A fault that was injected; times in seconds since the drill began.

    Attributes:
        recovery_s: from healing to the next committed round; None where none came.
        problem: what went wrong with the fault itself, or "".
    """

    fault: str
    target: str
    began: float
    ended: float
    recovery_s: float | None = None
    problem: str = ""

    @property
    def injected(self) -> Injected:
        """The same, for the checkers of histories."""
        return Injected(self.fault, self.target, self.began, self.ended)


@dataclass(frozen=True)
class FaultRow:
    """All strikes of one fault."""

    fault: str
    targets: tuple[str, ...]
    times: int
    recovered: int
    median_s: float | None
    longest_s: float | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class DrillResult:
    """How a drill ended.

    Attributes:
        seconds: that it took, from the first round to the last word.
        closed: (second, version) of each round as it closed.
        dropped: messages that the observer could not decode.
        checks: what each checker found.
    """

    plan: str
    seed: int
    nodes: int
    seconds: float
    rounds: int
    closed: Sequence[tuple[float, int]]
    dropped: int
    strikes: Sequence[Struck]
    checks: Mapping[str, Sequence[Violation]]

    @property
    def holds(self) -> bool:
        """Whether every checker holds."""
        return not any(self.checks.values())

    @property
    def violations(self) -> list[Violation]:
        """All that was found."""
        return [violation for found in self.checks.values() for violation in found]

    @property
    def faults(self) -> list[FaultRow]:
        """By fault, in the order of their first strikes."""
        return [
            _row(name, [struck for struck in self.strikes if struck.fault == name])
            for name in dict.fromkeys(struck.fault for struck in self.strikes)
        ]

    def to_json(self) -> str:
        """All of it but the single rounds."""
        table = {
            "plan": self.plan,
            "seed": self.seed,
            "holds": self.holds,
            "nodes": self.nodes,
            "seconds": round(self.seconds, 2),
            "rounds": self.rounds,
            "undecodable": self.dropped,
            "faults": [asdict(row) for row in self.faults],
            "checks": {name: [asdict(one) for one in found] for name, found in self.checks.items()},
            "strikes": [asdict(struck) for struck in self.strikes],
        }
        return json.dumps(table, indent=2, default=str)


def _row(name: str, strikes: Sequence[Struck]) -> FaultRow:
    times = [struck.recovery_s for struck in strikes if struck.recovery_s is not None]
    return FaultRow(
        fault=name,
        targets=tuple(sorted({struck.target for struck in strikes})),
        times=len(strikes),
        recovered=len(times),
        median_s=round(median(times), 3) if times else None,
        longest_s=round(max(times), 3) if times else None,
        problems=tuple(struck.problem for struck in strikes if struck.problem),
    )


def seconds_shown(seconds: float | None) -> str:
    """A recovery time for people."""
    return DASH if seconds is None else f"{seconds:.2f} s"


def held_shown(verdict: DrillResult, row: FaultRow) -> str:
    """What held of one fault; where a checker fails, nobody can say by which fault."""
    missing = row.times - row.recovered
    if row.problems:
        return "✗ " + "; ".join(row.problems)
    if missing:
        return f"✗ no round after {missing} of them"
    return f"✓ all {len(verdict.checks)} checkers" if verdict.holds else "✓ recovered"


def check_shown(found: Sequence[Violation]) -> str:
    """What a checker found."""
    return f"✗ {violations_shown(len(found))}" if found else "✓ holds"


def violations_shown(count: int) -> str:
    """A number of violations."""
    return f"{count:,} violation{'' if count == 1 else 's'}"


def summary_line(verdict: DrillResult) -> str:
    """The whole drill in a line."""
    ending = "everything held" if verdict.holds else violations_shown(len(verdict.violations))
    return (
        f"{verdict.rounds:,} rounds, {verdict.nodes} nodes, {len(verdict.strikes)} faults in "
        f"{duration(verdict.seconds)}: {ending}"
    )


def print_verdict(console: Console, verdict: DrillResult) -> None:
    """The verdict as tables."""
    table = _table("fault", "times", "recovery median", "longest", "what held")
    for row in verdict.faults:
        table.add_row(
            row.fault,
            str(row.times),
            seconds_shown(row.median_s),
            seconds_shown(row.longest_s),
            Text(held_shown(verdict, row)),
        )
    checks = _table("checker", "verdict")
    for name, found in verdict.checks.items():
        checks.add_row(name, Text(check_shown(found)))
    for part in (table, checks):
        console.print()
        console.print(part)
    console.print()
    for line in _lines(verdict.violations):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(summary_line(verdict), markup=False, highlight=False, soft_wrap=True)


def _lines(violations: Sequence[Violation]) -> Iterable[str]:
    for violation in violations[:MOST_VIOLATIONS]:
        yield printable(f"✗ {violation.checker}: {violation.where}: {violation.problem}")
    if len(violations) > MOST_VIOLATIONS:
        yield f"… and {len(violations) - MOST_VIOLATIONS} more in verdict.json"


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in heads:
        table.add_column(head, no_wrap=head != "what held", justify="right" if head == "times" else "left")
    return table
