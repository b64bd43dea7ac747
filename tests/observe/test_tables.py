"""Tables and JSON of a ledger: what stands out is seen, nothing steers a terminal, and numbers stay whole."""

import json
import re
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console, RenderableType

from meerkat_mq.core.metrics import METRICS
from meerkat_mq.ledger.shown import (
    NodeShown,
    RebuiltShown,
    RoundShown,
    RunShown,
    StepShown,
    TermShown,
    UpdateShown,
    json_line,
)
from meerkat_mq.observe.figures import human_bytes
from meerkat_mq.observe.tables import (
    MOST_SHOWN,
    path_table,
    round_pages,
    round_table,
    status_line,
    status_table,
    step_table,
)

NODE = NodeShown("n0", 0, "pi", "online", 2.0, 0xABC, 1200, 40, 3520, 0, "accepted", "", None, None, None, None, None)
RUN = RunShown(
    "f", "ab" * 16, True, 3, "5" * 16, "here", 40, 100, 0.7, 0.31, 40, 0.5, 1, 0.5, 0.012, 0.25, "", (NODE,),
    figures={"accuracy": 0.7, "loss": 0.31}, base_figures={"accuracy": 0.5},
)  # fmt: skip
UPDATE = UpdateShown(7, "n0", 0, 0, 0xABC, 1, ("0" * 16, "f" * 16), (1.25, float("inf")), float("nan"), "not finite")
ROUND = RoundShown(
    7, 3, "2026-11-28T19:20:08.123456Z", 4, True, None, "", "cd" * 16, "ef" * 16,
    (TermShown(0, 0, "0" * 16, -0.1),), (UPDATE,),
)  # fmt: skip


def text(shown: RenderableType, width: int = 160) -> str:
    out = StringIO()
    Console(file=out, width=width).print(shown)
    return out.getvalue()


def test_a_flagged_node_stands_out() -> None:
    bad = replace(NODE, node="n1", verdict="outlier", flagged="against")
    run = replace(RUN, nodes=(NODE, bad))
    out = StringIO()
    Console(file=out, width=160, force_terminal=True).print(status_table(run))
    line = next(line for line in out.getvalue().splitlines() if "n1" in line)
    assert "\x1b[1;31m" in line
    assert "flagged: against" in line
    assert status_line(run).endswith("2 of 2 nodes online, flagged: n1")


def test_what_was_counted_is_explained() -> None:
    counted = text(status_table(replace(RUN, counts={"refused: outlier": 1200, "closed at the deadline": 3})))
    lines = [" ".join(line.split()) for line in counted.splitlines()[-2:]]
    expected = {"refused: outlier": "1,200", "closed at the deadline": "3"}
    assert lines == [f"{name}: {count} {METRICS[name]}" for name, count in expected.items()]


def test_a_buffered_run_its_sleepers_and_its_displacements() -> None:
    nodes = (NODE, replace(NODE, node="n1", status="asleep"), replace(NODE, node="n2", displacement=2048))
    run = replace(RUN, nodes=nodes, mode="buffered: 8 updates close a version", staleness=1.25)
    assert "2 of 3 nodes online, 1 asleep, 1.25 versions stale" in status_line(run)
    shown = text(status_table(run))
    for words in (
        "buffered: 8 updates close a version",
        "1.25 versions in the mean",
        "1 of 3 nodes",
        "asleep  2.0 s ago",
    ):
        assert words in shown
    assert f"accepted, displacement of {human_bytes(2048)}" in shown
    plain = text(status_table(RUN))
    assert "staleness" not in plain
    assert "asleep" not in plain


def test_ages_and_displacements_are_shown_where_there_are_any() -> None:
    values = replace(UPDATE, node="n1", seeds=(), scalars=(), displacement="ab" * 16, size=3000, loss=0.5, entry=9)
    stale = replace(
        ROUND, round=9, terms=(TermShown(0, 0, "0" * 16, -0.1, 2),), updates=(UPDATE, values),
        displacement="cd" * 16, size=5000,
    )  # fmt: skip
    page = text(round_pages([stale]), width=200)
    assert f"displacement {'ab' * 16}" in page
    assert "cd" * 16 in page
    assert page.count("age ") == 2
    assert "age " not in text(round_pages([ROUND]))
    found = json.loads(json_line(values))
    assert (found["round"], found["entry"], found["displacement"], found["size"]) == (7, 9, "ab" * 16, 3000)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.012, "12 ms a round"), (3.0, "3.0 s a round"), (None, "– a round")]
)  # fmt: skip
def test_the_pace(seconds: float | None, words: str) -> None:
    assert words in status_line(replace(RUN, round_s=seconds))


def test_a_finished_run() -> None:
    assert "all 100 closed: finished" in text(status_table(replace(RUN, round=100)))
    assert "40 of 100 closed; round 40 is open, 1 acknowledged" in text(status_table(RUN))


def test_before_any_node() -> None:
    out = text(status_table(replace(RUN, nodes=(), loss=None, closed_s=None, round_s=None)))
    assert "no node was seen yet" in out
    assert "– a round, the last closed –" in out


def test_many_nodes_end_in_a_line() -> None:
    out = text(status_table(replace(RUN, nodes=(NODE,) * (MOST_SHOWN + 5))))
    assert "… and 5 more" in out
    assert out.count("accepted") == MOST_SHOWN


def test_nothing_steers_the_terminal() -> None:
    run = replace(RUN, host="a\x1b[2Jb", nodes=(replace(NODE, status="\x1b]0;x", node="[red]n"),))
    assert "\x1b" not in text(status_table(run))
    assert "[red]n" in text(status_table(run))


@pytest.mark.parametrize("width", [60, 160])
def test_numbers_stay_whole_in_a_narrow_terminal(width: int) -> None:
    out = text(round_pages([ROUND]), width)
    assert "…" not in out
    for column in ("cd" * 16, "ef" * 16):
        assert column in out.replace(" ", "").replace("\n", "")


def test_a_round() -> None:
    out = text(round_pages([ROUND]))
    assert "by its deadline" in out
    assert "0 of 1 updates accepted" in out
    assert "none due" in out
    assert "deadline" in text(round_table([ROUND]))
    assert "all updates" in text(round_table([replace(ROUND, overdue=False)]))
    assert "age" not in text(round_table([ROUND]))


def test_a_buffered_round_says_that_its_buffer_was_full_and_how_old_its_updates_were() -> None:
    fresh, stale = replace(UPDATE, entry=7), replace(UPDATE, round=4, node="n1", entry=7)
    buffered = replace(ROUND, overdue=False, buffer=2, updates=(fresh, stale))
    assert re.search(r"age .*\n.* buffer full +0–3 ", text(round_table([buffered])))
    assert re.search(r"all updates +0–3 ", text(round_table([replace(buffered, asked=2)])))
    assert re.search(r"all updates +0 ", text(round_table([replace(buffered, updates=(fresh,))])))
    assert re.search(r"deadline +3 ", text(round_table([replace(buffered, overdue=True, updates=(stale,))])))
    assert "when its buffer was full" in text(round_pages([buffered]))
    assert "when all expected updates were committed" in text(round_pages([replace(buffered, asked=2)]))


def test_nobody_is_behind_a_finished_run() -> None:
    run = replace(RUN, nodes=(replace(NODE, behind=None),))
    assert "many" in text(status_table(run))
    assert "many" not in text(status_table(replace(run, round=run.rounds)))


def test_a_path_has_a_line_a_step() -> None:
    lines = [line.split() for line in text(path_table([UPDATE])).splitlines()]
    assert lines[1] == ["7", "2748", "1", "0", "0", "0" * 16, "1.25", "nan", "not", "finite"]
    assert lines[2] == ["7", "2748", "1", "0", "1", "f" * 16, "inf"]


def test_json_has_no_nan() -> None:
    shown = json.loads(json_line(ROUND), parse_constant=pytest.fail)
    assert shown["updates"][0]["scalars"] == [1.25, None]
    assert (shown["updates"][0]["loss"], shown["loss"], shown["terms"][0]["coefficient"]) == (None, None, -0.1)
    assert json.loads(json_line(RUN))["nodes"][0]["packet_bytes"] == 3520


# --- 80 columns ---

MANY = replace(
    NODE,
    node="gateway-17",
    rows=1_200_000,
    updates=123_456,
    packet_bytes=123_456_789,
    seen_s=3_723.0,
    gradip=0.00012345,
)
BIG = replace(
    ROUND, round=1_234_567, term=1_024, asked=1_000, overdue=True, loss=1.23456, digest="cd" * 16,
    terms=ROUND.terms * 400,
    updates=(replace(UPDATE, round=1_234_567, slot=999, boot=4_294_967_295, scalars=(-1.23456789e-10, 2.5)),),
)  # fmt: skip


@pytest.mark.parametrize("width", [80, 100, 200])
def test_tables_fit_and_no_number_is_broken(width: int) -> None:
    rebuilt = RebuiltShown(1_234_567, "gateway-17", 3, 99, "0" * 16, -1.23456789e-10, -1.23456789e-10, 1.23456789e-10)
    shown = {
        "status": text(status_table(replace(RUN, nodes=(MANY,))), width),
        "rounds": text(round_table([BIG]), width),
        "buffered": text(
            round_table([replace(BIG, buffer=1, updates=(replace(BIG.updates[0], entry=1_234_580),))]), width
        ),
        "round": text(round_pages([BIG]), width),
        "path": text(path_table(BIG.updates), width),
        "steps": text(step_table([rebuilt]), width),
    }
    for name, page in shown.items():
        assert max(map(len, page.splitlines())) <= width, name
    for name, numbers in {
        "status": ["123,456", "123 MB", "1 h 02 min", "70.0 %"],
        "rounds": ["1,234,567", "2026-11-28 19:20:08Z", "1.2346"],
        "buffered": ["1,234,567", "2026-11-28 19:20:08Z", " 13 "],
        "round": ["-1.23456789e-10", "f" * 16, "cd" * 16],
        "path": ["1,234,567", "-1.23456789e-10", "0" * 16],
        "steps": ["1234567", "-1.23456789e-10", "1.23456789e-10"],
    }.items():
        for number in numbers:
            assert number in shown[name], (name, number, shown[name])


def test_what_does_not_fit_is_named() -> None:
    assert text(round_table([BIG]), 80).splitlines()[-1].startswith("too narrow for: term")
    assert "too narrow" not in text(round_table([BIG]), 200)


def test_a_long_id_is_folded_and_the_numbers_stay() -> None:
    page = text(status_table(replace(RUN, nodes=(replace(MANY, node="x" * 64),))), 80)
    assert max(map(len, page.splitlines())) <= 80
    assert "123,456" in page


def test_accuracy_and_the_server_are_seen_first() -> None:
    lines = text(status_table(RUN), 80).splitlines()
    assert " ".join(lines[0].split()) == "accuracy 70.0 % after 40 rounds, +20.0 points from 50.0 %"
    assert " ".join(lines[1].split()) == "loss 0.25 on the nodes' rows; 0.31 on held-out rows"
    assert lines[4].startswith("server    running; term 3 on here")
    stopped, unknown = (text(status_table(replace(RUN, running=running))) for running in (False, None))
    assert "not running; term 3 on here" in stopped
    assert "not known to run: ask on its own host" in unknown
    assert "accuracy 70.0 %, loss 0.25" in status_line(RUN)
    assert "server running" in status_line(RUN)


# --- virtual paths ---

JUDGED = replace(NODE, node="n1", gradip=2.5, judged=40, rho_later=float("inf"), rho_quiet=0.75, early_stopped_since=20)
STEP = StepShown(7, "n0", 0, 3, "0" * 16, 1.25, -0.5)


def test_a_judged_path_has_its_verdict_and_the_numbers_behind_it() -> None:
    run = replace(RUN, early_stopping="by vpcs", nodes=(NODE, JUDGED, replace(JUDGED, early_stopped_since=None)))
    lines = text(status_table(run), width=200).splitlines()
    assert lines[6].split() == ["early", "stopping", "by", "vpcs"]
    assert lines[-4].split()[-3:] == ["GradIP", "virtual", "path"]
    assert lines[-3].split()[-2:] == ["–", "–"]
    assert "2.5  early-stopped since round 20: rho_later inf, rho_quiet 0.75 (round 40)" in lines[-2]
    assert "2.5  rho_later inf, rho_quiet 0.75 (round 40)" in lines[-1]
    assert status_line(run).endswith("early-stopped: n1")


def test_what_is_not_measured_has_no_column() -> None:
    shown = text(status_table(RUN))
    assert "GradIP" not in shown
    assert "virtual path" not in shown
    assert "early" not in shown


def test_an_early_stopped_update_counts_as_accepted() -> None:
    updates = (replace(UPDATE, verdict="early stopped"), replace(UPDATE, verdict="accepted"), UPDATE)
    assert replace(ROUND, updates=updates).accepted == 2


def test_steps_page_by_page_stand_below_each_other() -> None:
    pages = text(step_table([STEP])) + text(step_table([replace(STEP, gradip=None)], head=False))
    head, first, second = pages.splitlines()
    assert head.split()[-2:] == ["g", "GradIP"]
    assert (first.split()[-2:], second.split()[-2:]) == (["1.25", "-0.5"], ["1.25", "–"])
    assert first.index("1.25") == second.index("1.25")
    rebuilt = RebuiltShown(7, "n0", 0, 3, "0" * 16, 1.25, -0.5, 0.125)
    assert text(step_table([rebuilt])).split()[-2:] == ["-0.5", "0.125"]
    assert json.loads(json_line(rebuilt))["distance"] == 0.125
