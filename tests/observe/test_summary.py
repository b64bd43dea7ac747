import io
import re
from typing import Any

from rich.console import Console

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.observe.report import NodeReport
from meerkat_mq.observe.summary import print_summary
from tests.observe.made_up import a_descriptor, a_node, a_report, an_evaluation, calibrated


def summary(*, width: int = 80, terminal: bool = False, **changes: Any) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, _environ={"TERM": "xterm"})
    print_summary(console, a_report(**changes))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def test_without_a_terminal_it_is_plain_and_has_every_figure() -> None:
    assert (
        summary()
        == """
held-out accuracy   88.4 %: +30.3 points, from 58.1 %
                    majority class 31.0 % of 1,000 rows
of the gap closed   92 %: first-order training on the same mask reaches 91.2 %
traffic of a node   119 kB: 31.2 kB sent, 88.0 kB received (the mask too)
                    21,000 × less than all weights as often, both ways: 2.55 GB
                    15 × less than masked values as often, both ways: 1.78 MB
weights tuned       742: 0.070 % of all 1,063,040
                    0.10 % of the 740,000 in the masked matrices
training time       1 min 52 s: 300 rounds, 2.7 a second
same as the server  ✓ 4 of 4: nodes hold its weights, bit for bit (0f0f0f0f…)
counted             late: 2, refused: resynchronise: 1

node    rows by class  updates     sent  received  peak memory  weights
node-0   140/96/90/74      300  31.2 kB   88.0 kB      312 MiB  ✓ equal
node-1  61/180/103/56      300  31.2 kB   88.0 kB      312 MiB  ✓ equal
node-2  210/34/120/36      300  31.2 kB   88.0 kB      312 MiB  ✓ equal
node-3      0/0/0/400      300  31.2 kB   88.0 kB      312 MiB  ✓ equal
"""
    )


def test_a_wide_terminal_gets_a_column_a_class() -> None:
    assert "routine  degraded  failure  security  updates" in summary(width=100)


def test_many_classes_are_summed_up() -> None:
    classes = [f"class {index}" for index in range(100)]
    text = summary(classes=classes, nodes={"node-0": a_node(labels=[1] * 100, rows=100)})
    assert re.search(r"node +rows +updates.*\nnode-0 +100 +300 ", text)


def test_on_a_terminal_it_has_the_same_figures() -> None:
    assert "88.4 %: +30.3 points, from 58.1 %" in summary(terminal=True)


def test_bfloat16_weights_would_cost_half() -> None:
    assert "less than all weights as often, both ways: 1.28 GB" in summary(descriptor=a_descriptor(dtype="bfloat16"))


def test_weights_are_compared_over_the_rounds_that_the_node_took_part_in() -> None:
    # 2 × 100 × 1,063,040 × 4 bytes
    assert "less than all weights as often, both ways: 850 MB" in summary(nodes={"node-0": a_node(updates=100)})
    assert "less than all weights as often, both ways: 850 MB" in summary(closed=100)


def test_what_is_not_known_is_left_out() -> None:
    bare = NodeReport(updates=300, rows=400, sent_bytes=31_200, proven=290)
    text = summary(nodes={"node-0": bare}, parameters=None, covered=None, seconds=None, evaluations=[], bound=None)
    assert "weights tuned       742\n" in text
    assert "training time       –: 300 rounds\n" in text
    assert "all weights" not in text
    assert "sent by a node      31.2 kB: 29 × less than masked values as often: 890 kB\n" in text
    assert "same as the server  ✓ 1 of 1: nodes began their last update from its weights,\n" in text
    assert "✓ at version 290\n" in text


def test_a_warning_comes_first() -> None:
    assert summary(warning="the loss rises; lower rounds.lr").startswith(
        "\nwarning             the loss rises; lower rounds.lr\n"
    )


def test_a_node_that_differs_or_said_nothing_is_named() -> None:
    text = summary(nodes={"a": a_node(), "b": a_node(digest="aa" * 16), "c": a_node(digest="")})
    assert "✗ 1 of 3: nodes hold its weights, bit for bit (0f0f0f0f…)\n" in text
    assert "others, or not known: b, c\n" in text
    assert "✗ differs\n" in text
    assert "– not known\n" in text


def test_without_a_bound_there_is_no_gap() -> None:
    text = summary(bound=None)
    assert "bound" not in text
    assert "gap" not in text


def test_a_bound_below_the_start_has_no_gap_to_close() -> None:
    text = summary(bound=0.5)
    assert "first-order training on the same mask reaches 50.0 %\n" in text
    assert "gap" not in text


def test_one_evaluation_gains_nothing() -> None:
    assert "58.1 %: +0.0 points, from 58.1 %" in summary(evaluations=[an_evaluation(0, 0.581)])


def test_an_empty_run() -> None:
    text = summary(evaluations=[], losses=[], closed=0, nodes={}, counts={"left": 4}, seconds=0.0, covered=None)
    assert "held-out accuracy  not measured\n" in text
    assert "training time      0.0 s: 0 rounds\n" in text
    assert "masked matrices" not in text
    assert "counted" not in text


def test_only_the_first_of_many_nodes_are_shown() -> None:
    text = summary(nodes={f"node-{index}": a_node() for index in range(1000)})
    assert "node-39 " in text
    assert "node-40 " not in text
    assert "… and 960 more\n" in text


def test_hostile_names_are_shown_as_they_are() -> None:
    text = summary(width=200, classes=["[red]a", "\x1b[2J", "c[/]", "d"], nodes={"[b]x\x1b": a_node()})
    assert "[red]a" in text
    assert "[b]x�" in text
    assert "\x1b" not in text


def test_early_stopped_nodes_are_named_with_their_figures() -> None:
    text = summary(**calibrated("node-3", "node-0", "node-1", "node-2"), width=100)
    assert (
        "early stopping      1 of 4 nodes early-stopped by vpcs: node-3; 1 local step a round instead of 10.\n" in text
    )
    assert "                    node-3: rho_later 4.25, rho_quiet 0.62\n" in text


def test_where_early_stopping_changes_nothing_the_summary_says_so() -> None:
    assert "early stopping      Early stopping changes nothing at T = 1" in summary(
        early_stopping=EarlyStoppingConfig(by="vpcs")
    )
