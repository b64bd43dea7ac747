"""What a drill found: which faults struck, how long recovery took, what held; on a terminal, and as a page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from rich.console import Console
from rich.table import Table
from rich.text import Text

from meerkat_mq.chaos.plan import LINK
from meerkat_mq.chaos.stage import BROKER, SERVER
from meerkat_mq.observe import charts
from meerkat_mq.observe.figures import DASH, duration
from meerkat_mq.observe.markup import Markup, document, section, table, tag
from meerkat_mq.observe.tables import say
from meerkat_mq.simulate.checkers import Violation
from meerkat_mq.simulate.history import Injected

MOST_PRINTED, MOST_ON_PAGE = 20, 200  # violations
FAULT_HEADS = ("fault", "times", "recovery median", "longest", "what held", "on")
CHECK_HEADS = ("checker", "verdict")
_RECOVERY = "Recovery: from healing to the next committed round."


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
        names = dict.fromkeys(struck.fault for struck in self.strikes)
        return [_row([struck for struck in self.strikes if struck.fault == name]) for name in names]

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


def _row(strikes: Sequence[Struck]) -> FaultRow:
    times = [struck.recovery_s for struck in strikes if struck.recovery_s is not None]
    return FaultRow(
        fault=strikes[0].fault,
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


def violations_shown(count: int) -> str:
    """A number of violations."""
    return f"{count:,} violation{'' if count == 1 else 's'}"


def fault_cells(verdict: DrillResult) -> list[list[str]]:
    """A line a fault, for the columns of FAULT_HEADS; where a checker fails, nobody can say by which fault."""
    held = f"✓ all {len(verdict.checks)} checkers" if verdict.holds else "✓ recovered"
    return [
        [row.fault, f"{row.times:,}", seconds_shown(row.median_s), seconds_shown(row.longest_s),
         _failed(row) or held, ", ".join(row.targets)]
        for row in verdict.faults
    ]  # fmt: skip


def _failed(row: FaultRow) -> str:
    missing = row.times - row.recovered
    found = "; ".join(row.problems) or (f"no round after {missing} of them" if missing else "")
    return f"✗ {found}" if found else ""


def check_cells(verdict: DrillResult) -> list[list[str]]:
    """A line a checker: its name, and what it found."""
    return [
        [name, f"✗ {violations_shown(len(found))}" if found else "✓ holds"] for name, found in verdict.checks.items()
    ]


def summary_line(verdict: DrillResult) -> str:
    """The whole drill in a line."""
    ending = "everything held" if verdict.holds else violations_shown(len(verdict.violations))
    return (
        f"{verdict.rounds:,} rounds, {verdict.nodes} nodes, {len(verdict.strikes)} faults in "
        f"{duration(verdict.seconds)}: {ending}"
    )


def print_verdict(console: Console, verdict: DrillResult) -> None:
    """The verdict as tables."""
    found = verdict.violations
    console.print("", _table(FAULT_HEADS[:-1], fault_cells(verdict)), "", _table(CHECK_HEADS, check_cells(verdict)), "")
    for violation in found[:MOST_PRINTED]:
        say(console, f"✗ {violation.checker}: {violation.where}: {violation.problem}")
    if len(found) > MOST_PRINTED:
        say(console, f"… and {len(found) - MOST_PRINTED} more in verdict.json")
    say(console, summary_line(verdict))


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in heads:
        table.add_column(head, no_wrap=head != "what held", justify="right" if head == "times" else "left")
    for cells in lines:
        table.add_row(*map(Text, cells[: len(heads)]))
    return table


def render(verdict: DrillResult) -> str:
    """The page as HTML."""
    return document(
        f"{verdict.plan} · Meerkat-MQ drill",
        _header(verdict),
        _progress(verdict),
        section("Faults", table(FAULT_HEADS, fault_cells(verdict)), style="card words", note=_RECOVERY),
        section("What must hold", table(CHECK_HEADS, check_cells(verdict)), style="card words"),
        _violations(verdict),
        _strikes(verdict),
    )


def _header(verdict: DrillResult) -> Markup:
    return tag(
        "header",
        tag("p", "Meerkat-MQ fault drill", class_="kicker"),
        tag("h1", verdict.plan, tag("span", f" · {'✓ holds' if verdict.holds else '✗ fails'}", class_="task")),
        tag("p", f"{summary_line(verdict)} · seed {verdict.seed}", class_="lead"),
    )


def _progress(verdict: DrillResult) -> Markup:
    places = sorted({_place(struck.target) for struck in verdict.strikes})
    bands = [
        charts.Band(
            f"{struck.fault} on {struck.target}, {struck.began:.1f} to {struck.ended:.1f} s",
            charts.colour(1 + places.index(_place(struck.target))),
            struck.began,
            struck.ended,
        )
        for struck in verdict.strikes
    ]
    line = charts.Line("rounds", "main", verdict.closed)
    x = charts.count_scale(int(verdict.seconds) + 1)
    return section(
        "Progress",
        charts.line_chart(
            "Rounds closed over time", [line], [], x, lambda value: f"{value:,.0f}", axis="seconds", bands=bands
        ),
        charts.legend([(place, charts.colour(index)) for index, place in enumerate(places, 1)]),
        note="Rounds closed; bands are faults while they last, by what they strike.",
    )


def _place(target: str) -> str:
    process = target.removeprefix(LINK)
    place = process if process in (BROKER, SERVER) else "node"
    return place if process == target else f"link of the {place}"


def _violations(verdict: DrillResult) -> Markup:
    if verdict.holds:
        return Markup()
    rows = ([one.checker, one.where, one.problem] for one in verdict.violations[:MOST_ON_PAGE])
    return section("Violations", table(["checker", "where", "problem"], rows), style="card words")


def _strikes(verdict: DrillResult) -> Markup:
    rows = (
        [f"{one.began:.1f} s", one.fault, one.target, f"{one.ended:.1f} s", seconds_shown(one.recovery_s), one.problem]
        for one in verdict.strikes
    )
    return section("Schedule", table(["from", "fault", "on", "healed", "recovery", ""], rows), style="card words")
