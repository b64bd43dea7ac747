"""What status and ledger show of a run, from its ledger alone."""

import random
import re
from pathlib import Path

import pytest

from meerkat_mq.config import EarlyStoppingConfig, GuardsConfig
from meerkat_mq.core.path import seed_for
from meerkat_mq.errors import LedgerError, RunMismatch
from meerkat_mq.ledger import inspect
from meerkat_mq.ledger.inspect import path_shown, round_shown, rounds_shown, run_shown, steps_shown
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.observe.tables import status_line
from meerkat_mq.rounds.records import Verdict
from tests.ledger.ledgers import RUN, Writer, alter


def close(writer: Writer, *times: float) -> None:
    """Rounds that closed at these times."""
    for at in times:
        writer.round()
        alter(writer.folder, "UPDATE entries SET closed = ? WHERE version = ?", at, len(writer.entries) - 1)


NOW = 1_796_000_000.0


@pytest.mark.parametrize(
    ("times", "now", "closed_s", "round_s"),
    [
        ((1.0, 3.0, NOW, NOW + 2), NOW + 3, 1.0, 2.0),  # at 1970, then set
        ((NOW, NOW + 2, 5.0, 7.0), 8.0, 1.0, 2.0),  # back to 1970
        ((NOW, NOW + 2, NOW - 9_000, NOW - 8_998), NOW - 8_997, 1.0, 2.0),
        ((NOW, NOW + 2), 8.0, None, 2.0),
        ((5.0, 7.0), NOW, None, 2.0),
        ((7.0, NOW), NOW, 0.0, None),
        ((NOW, 7.0), 7.0, 0.0, None),
        ((NOW, NOW + 1), NOW + 0.5, 0.0, 1.0),  # a round closed while this was read
        ((NOW, NOW + 2, NOW + 7_202, NOW + 7_204), NOW + 7_204, 0.0, 2.0),  # an hour of summer
    ],
)
def test_no_step_of_the_clock_is_a_pace(
    tmp_path: Path, times: tuple[float, ...], now: float, closed_s: float | None, round_s: float | None
) -> None:
    writer = Writer(tmp_path)
    close(writer, *times)
    writer.see(0, "online", times[-1])
    shown = run_shown(writer.ledger, now=now)
    assert (shown.closed_s, shown.round_s, shown.nodes[0].seen_s) == (closed_s, round_s, closed_s)
    assert re.search(r"[-−]\d+ (ms|s)", status_line(shown)) is None


def test_a_run_as_it_stands(tmp_path: Path) -> None:
    writer = Writer(tmp_path, absent={(1, 2), (2, 2), (3, 1), (3, 2)}, refused={(2, 1): Verdict.NOT_FINITE})
    close(writer, 1000.0, 1002.0, 1005.0)
    writer.hear()
    writer.see(0, "online", 1006.0)
    writer.see(2, "lost", 1001.0)
    shown = run_shown(writer.ledger, now=1007.0)
    assert (shown.federation, shown.run, shown.term, shown.server_id) == ("f", RUN.hex(), 1, "5" * 16)
    assert (shown.host, shown.round, shown.rounds, shown.heard) == ("here", 3, 6, 1)
    assert (shown.closed_s, shown.round_s) == (2.0, 2.5)
    assert shown.loss == writer.records(2)[0].loss  # the other was refused
    first, second, third = shown.nodes
    assert (first.node, first.slot, first.status, first.seen_s, first.boot, first.host) == (
        *("n0", 0, "online", 1.0, 7, "there"),
    )
    assert (first.rows, first.updates, first.packet_bytes) == (50, 3, 264)
    assert [node.behind for node in shown.nodes] == [0, 0, 2]
    assert [node.verdict for node in shown.nodes] == ["accepted", "not finite", "accepted"]
    assert (second.status, second.seen_s, second.boot, second.rows) == ("", None, None, 0)
    assert (third.status, third.seen_s) == ("lost", 6.0)


def test_before_the_first_round(tmp_path: Path) -> None:
    shown = run_shown(Writer(tmp_path).ledger)
    assert (shown.round, shown.heard, shown.closed_s, shown.round_s, shown.loss) == (0, 0, None, None, None)
    assert [(node.behind, node.verdict) for node in shown.nodes] == [(None, "")] * 3


def test_a_round_of_refused_updates_has_no_loss(tmp_path: Path) -> None:
    writer = Writer(tmp_path, nodes=1, refused={(0, 0): Verdict.NOT_FINITE})
    writer.round()
    assert run_shown(writer.ledger).loss is None
    shown = round_shown(writer.ledger, 0)
    assert (shown.loss, shown.terms, shown.accepted) == (None, (), 0)


def test_a_node_away_for_longer_than_the_window(tmp_path: Path) -> None:
    away = GuardsConfig().window + 1
    writer = Writer(tmp_path, count=5 + away, absent={(version, 1) for version in range(5, 5 + away)})
    for _ in range(5 + away):
        writer.round()
    assert [node.behind for node in run_shown(writer.ledger).nodes] == [0, None, 0]


def test_a_flagged_node_is_named(tmp_path: Path) -> None:
    writer = Writer(tmp_path, refused={(version, 1): Verdict.NOT_FINITE for version in range(4)})
    for _ in range(4):
        writer.round()
    assert [node.flagged for node in run_shown(writer.ledger).nodes] == ["", "not finite", ""]


def test_a_round_whole(tmp_path: Path) -> None:
    writer = Writer(
        tmp_path, nodes=6, lanes=2, steps=2, digest_every=2, absent={(1, 5)}, refused={(1, 4): Verdict.OUTLIER}
    )  # fmt: skip
    close(writer, 1.0, 2.0)
    shown, entry, records = round_shown(writer.ledger, 1), writer.entries[1], writer.records(1)
    assert (shown.round, shown.term, shown.closed, shown.asked, shown.overdue) == (
        *(1, 1, "1970-01-01T00:00:02.000000Z", 6, True),
    )
    assert (shown.accepted, len(shown.updates)) == (4, 5)
    assert shown.loss == pytest.approx(sum(record.loss for record in records[:4]) / 4)
    assert (shown.digest, shown.previous) == (entry.digest.hex(), entry.previous.hex())
    assert shown.hash == entry.hash(RUN).hex()
    assert [(term.lane, term.step, term.coefficient) for term in shown.terms] == [
        (term.lane, term.step, term.coefficient) for term in entry.terms
    ]
    assert [(term.lane, term.step) for term in shown.terms] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [int(term.seed, 16) for term in shown.terms] == [
        seed_for(RUN, 1, term.lane, term.step) for term in shown.terms
    ]
    last = shown.updates[-1]
    assert (last.node, last.slot, last.lane, last.boot, last.weight, last.verdict) == ("n4", 4, 0, 7, 1, "outlier")
    assert (last.scalars, last.loss) == (records[4].scalars, records[4].loss)
    assert [int(seed, 16) for seed in last.seeds] == [seed_for(RUN, 1, 0, step) for step in range(2)]
    assert round_shown(writer.ledger, 0).digest == ""


def test_a_round_that_its_buffer_closes_says_so(tmp_path: Path) -> None:
    writer = Writer(tmp_path, nodes=9, max_staleness=3, ages={(1, 2): 1}, absent={(0, 2), (1, 0)})
    close(writer, 1.0, 2.0)
    alter(tmp_path, "UPDATE entries SET overdue = 0")
    shown = round_shown(writer.ledger, 1)
    assert (shown.buffer, len(shown.updates), shown.full, shown.ages) == (8, 8, True, (0, 1))
    synchronous = Writer(tmp_path / "other", nodes=1)
    close(synchronous, 1.0)
    assert (round_shown(synchronous.ledger, 0).buffer, round_shown(synchronous.ledger, 0).full) == (0, False)


def test_rounds_in_order_over_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "PAGE", 3)
    writer = Writer(tmp_path, count=10, nodes=1)
    for _ in range(10):
        writer.round()
    draw = random.Random(0)
    for first, count in [(0, 10), (0, 3), (2, 6), (9, 5), (10, 5)] + [
        (draw.randrange(12), draw.randrange(1, 12)) for _ in range(20)
    ]:
        versions = [shown.round for shown in rounds_shown(writer.ledger, first, count)]
        assert versions == list(range(first, min(10, first + count)))


def test_a_round_that_did_not_close(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.round()
    writer.hear()
    with pytest.raises(RunMismatch, match="round 1: did not close; 1 rounds have"):
        round_shown(writer.ledger, 1)


def test_the_path_of_a_node(tmp_path: Path) -> None:
    writer = Writer(tmp_path, lanes=3, absent={(1, 2)}, refused={(3, 2): Verdict.TOO_LARGE})
    for _ in range(4):
        writer.round()
    writer.hear()
    path = list(path_shown(writer.ledger, "n2", 0, 100))
    assert [update.round for update in path] == [0, 2, 3, 4]  # the open round included
    assert [update.verdict for update in path] == ["accepted", "accepted", "too large", "accepted"]
    assert {(update.node, update.lane) for update in path} == {("n2", 2)}
    assert [update.scalars for update in path] == [writer.records(version)[-1].scalars for version in (0, 2, 3, 4)]
    assert [update.round for update in path_shown(writer.ledger, "n2", 1, 2)] == [2]


def test_a_node_that_nobody_knows(tmp_path: Path) -> None:
    writer = Writer(tmp_path, nodes=7)
    with pytest.raises(RunMismatch, match="node x: is not in the ledger; it knows n0, n1, n2, n3, n4, …"):
        list(path_shown(writer.ledger, "x", 0, 10))


def test_a_ledger_without_a_run(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / LEDGER_FILE)
    with pytest.raises(LedgerError, match="holds no run yet"):
        run_shown(ledger)
    ledger.close()


# --- virtual paths ---


def measured(folder: Path) -> Writer:
    """Six rounds, two of which calibrate; each flags one node of four, but not the same."""
    early = EarlyStoppingConfig(
        by="vpcs", steps=2, calibration_steps=12, every=4, rho_later=3.3, rho_quiet=0.4, require="either"
    )
    writer = Writer(folder, nodes=4, lanes=2, steps=5, early_stopping=early, refused={(2, 0): Verdict.OUTLIER})
    for _ in range(6):
        writer.round()
    return writer


def test_nodes_by_their_virtual_paths(tmp_path: Path) -> None:
    writer = measured(tmp_path)
    shown = run_shown(writer.ledger)
    assert shown.early_stopping == "by vpcs, judged in round 0 by 12 local steps, again every 4 rounds"
    judged = writer.judgements[4]
    assert [(node.judged, node.rho_later, node.rho_quiet) for node in shown.nodes] == [
        (4, judgement.rho_later, judgement.rho_quiet) for judgement in judged
    ]
    since = [node.early_stopped_since for node in shown.nodes]
    assert since == [4 if judgement.early_stopped else None for judgement in judged]
    assert since.count(4) == 1
    assert writer.judgements[0][since.index(4)].early_stopped is False
    for slot, node in enumerate(shown.nodes):
        sizes = [
            abs(g * product)
            for version in range(6)
            for g, product in zip(
                writer.ledger.records(version)[slot].scalars, writer.products(version)[slot % 2], strict=False
            )
            if (version, slot) != (2, 0)
        ]
        assert node.gradip == pytest.approx(sum(sizes) / len(sizes), rel=1e-12)


def test_gradip_of_nodes_and_steps(tmp_path: Path) -> None:
    writer = measured(tmp_path)
    steps = list(steps_shown(writer.ledger, None, 0, 100))
    assert [len([step for step in steps if step.round == version]) for version in (0, 2)] == [48, 15 - 3]
    assert {step.round for step in steps if step.node == "n0"} == {0, 1, 3, 4, 5}  # of round 2 it was refused
    for step in steps_shown(writer.ledger, "n3", 2, 3):
        assert (step.node, step.lane) == ("n3", 1)
        assert int(step.seed, 16) == seed_for(RUN, step.round, 1, step.step)
        assert step.gradip == step.g * writer.products(step.round)[1][step.step]
    assert sorted({step.round for step in steps_shown(writer.ledger, "n3", 2, 3)}) == [2, 3, 4]
    with pytest.raises(RunMismatch, match="node x: is not in the ledger"):
        list(steps_shown(writer.ledger, "x", 0, 10))


def test_rounds_before_gradip_was_kept_are_passed_over(tmp_path: Path) -> None:
    writer = measured(tmp_path)
    alter(tmp_path, "UPDATE entries SET products = NULL WHERE version < 3")
    assert {step.round for step in steps_shown(writer.ledger, None, 0, 100)} == {3, 4, 5}
    alter(tmp_path, "UPDATE entries SET products = x''")
    with pytest.raises(RunMismatch, match="GradIP: is not measured in this run: its mask has no pre-training gradient"):
        list(steps_shown(writer.ledger, None, 0, 100))
    assert [node.gradip for node in run_shown(writer.ledger).nodes] == [None] * 4


def test_at_one_local_step_the_run_says_that_filtering_changes_nothing(tmp_path: Path) -> None:
    writer = Writer(tmp_path, early_stopping=EarlyStoppingConfig(by="vpcs"))
    writer.round()
    shown = run_shown(writer.ledger)
    assert shown.early_stopping == "by vpcs: filtering changes nothing at local_steps = 1"
    assert [node.judged for node in shown.nodes] == [None] * 3


def test_how_many_nodes_are_not_judged_yet(tmp_path: Path) -> None:
    early = EarlyStoppingConfig(by="random", steps=2, calibration_steps=8)
    writer = Writer(tmp_path, nodes=4, steps=4, early_stopping=early, absent={(0, 1)})
    how = "by random, judged in round 0 by 8 local steps"
    assert run_shown(writer.ledger).early_stopping == f"{how}; 4 not judged yet"
    writer.round()
    assert run_shown(writer.ledger).early_stopping == f"{how}; 1 not judged yet"
