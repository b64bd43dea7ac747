"""The report page of a drill: one HTML file with everything in it."""

from meerkat_mq.chaos.plan import LINK
from meerkat_mq.chaos.stage import BROKER, SERVER
from meerkat_mq.chaos.verdict import (
    CHECK_HEADS,
    FAULT_HEADS,
    DrillResult,
    check_cells,
    fault_cells,
    seconds_shown,
    summary_line,
)
from meerkat_mq.observe import charts
from meerkat_mq.observe.markup import Markup, document, section, table, tag

MOST_VIOLATIONS = 200
_RECOVERY = "Recovery: from healing to the next committed round."


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
    rows = ([one.checker, one.where, one.problem] for one in verdict.violations[:MOST_VIOLATIONS])
    return section("Violations", table(["checker", "where", "problem"], rows), style="card words")


def _strikes(verdict: DrillResult) -> Markup:
    rows = (
        [f"{one.began:.1f} s", one.fault, one.target, f"{one.ended:.1f} s", seconds_shown(one.recovery_s), one.problem]
        for one in verdict.strikes
    )
    return section("Schedule", table(["from", "fault", "on", "healed", "recovery", ""], rows), style="card words")
