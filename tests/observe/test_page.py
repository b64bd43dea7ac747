import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.core.metrics import METRICS, meaning
from meerkat_mq.observe.page import write_report
from meerkat_mq.observe.report import NodeReport, Standing
from meerkat_mq.rounds.records import Judgement, Verdict
from meerkat_mq.wire.messages import Reason, in_words
from tests.observe.made_up import (
    TASK,
    a_descriptor,
    a_judgement,
    a_node,
    a_report,
    an_evaluation,
    calibrated,
)

VOID = {"meta"}


class Checker(HTMLParser):
    """Every element is closed in order; collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def page(tmp_path: Path) -> Any:
    def write(**changes: Any) -> tuple[str, Checker]:
        path = tmp_path / "report.html"
        write_report(path, a_report(**changes))
        assert list(tmp_path.iterdir()) == [path]
        html = path.read_text(encoding="utf-8")
        checker = Checker()
        checker.feed(html)
        checker.close()
        assert checker.open == []
        assert not re.search(r"\b(nan|inf)\b", html)
        return html, checker

    return write


def test_it_has_the_figures(page: Any) -> None:
    text = page()[1].text
    for figure in ("88.4 %", "+30.3 points, from 58.1 %", "majority class 31.0 % of 1,000 rows",
                   "first-order training on the same mask reaches 91.2 %", "first-order bound 91.2 %", "92 %",
                   "119 kB", "31.2 kB sent, 88.0 kB received (the mask too)", "742",
                   "21,000 × less than all weights as often, both ways: 2.55 GB", "0.070 % of all 1,063,040",
                   "✓ 4 of 4", "1 min 52 s", "12" * 16, "312 MiB", "✓ equal", "0.01"):  # fmt: skip
        assert figure in text, figure


def test_it_is_self_contained(page: Any) -> None:
    html, checker = page()
    assert checker.tags.isdisjoint({"script", "link", "img", "iframe", "object", "base"})
    assert {name for name, _ in checker.attributes}.isdisjoint({"href", "src", "style", "onload", "onclick"})
    assert "://" not in html
    assert "url(" not in html
    assert "@import" not in html


HOSTILE = "</title><script>alert(1)</script>\"'&<b onload=x>\x00\x1b\ud800"


def test_hostile_names_are_text(page: Any) -> None:
    task = TASK.describe().model_copy(update={"name": HOSTILE, "template": HOSTILE, "descriptions": (HOSTILE,) * 4})
    html, checker = page(
        model=HOSTILE,
        classes=[HOSTILE] * 4,
        nodes={HOSTILE: a_node()},
        counts={HOSTILE: 1},
        **(
            calibrated(HOSTILE, HOSTILE + "2")
            | {"descriptor": a_descriptor(local_steps=10).model_copy(update={"task": task})}
        ),
    )
    assert checker.tags.isdisjoint({"script"})
    assert "<script" not in html
    assert "<b onload" not in html
    assert not re.search(r"[\x00-\x09\x0b-\x1f\ud800-\udfff]", html)
    assert any("</title><script>alert(1)</script>\"'&<b onload=x>���" in text for text in checker.text)


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluations": [an_evaluation(0, 0.581)]},
        {"evaluations": []},
        {"evaluations": [], "losses": [], "closed": 0, "nodes": {}, "seconds": 0.0, "bound": None},
        {"evaluations": [an_evaluation(0, 0.5, majority=None)], "seconds": None, "parameters": None, "counts": {}},
        {"nodes": {"a": NodeReport(updates=3, rows=9, sent_bytes=312, proven=2)}, "digest": "", "bound": None},
        {"nodes": {"a": NodeReport(updates=0)}, "standing": Standing.UNKNOWN, "closed": 12},
        {"bound": None},
        {"nodes": {"node-0": a_node()}},
        {"nodes": {"node-0": a_node(labels=[0] * 4, updates=0, payload_bytes=0, packet_bytes=0)}},
        {"losses": [(0, 1.0)], "closed": 1},
        {"losses": [(number, 0.5) for number in range(9)]},
        {"losses": [(number, 0.0) for number in range(9)]},
        {"losses": [(0, 1.0), (5, 2.0)]},
        {"evaluations": [an_evaluation(version, 1.0, majority=1.0) for version in range(5)], "bound": 1.0},
        {"evaluations": [an_evaluation(version, 0.0, majority=0.0) for version in range(5)], "bound": 0.0},
        {"descriptor": a_descriptor(task=None, engine="toy")},
        {"classes": [f"class {index}" for index in range(100)], "nodes": {"node-0": a_node(labels=range(100))}},
        {"counts": {}, "covered": None},
        {"magnitudes": {"node-0": [(1, 0.0)], "node-1": []}},
        {"magnitudes": {"node-0": [(512, 0.25)]}},
        {"judgements": {"node-0": a_judgement("node-0", early_stopped=True, rho_later=math.inf)}},
        {"magnitudes": {f"node-{index}": [(1, 0.5), (2, 0.1)] for index in range(40)}},
    ],
    ids="+".join,
)
def test_every_kind_of_run_has_a_page(page: Any, changes: dict[str, Any]) -> None:
    html, checker = page(**changes)
    assert "field-logs-1m" in checker.text
    assert not re.search(r'(?:width|height)="-', html)


def test_one_evaluation_is_one_dot(page: Any) -> None:
    html = page(evaluations=[an_evaluation(0, 0.581)])[0]
    assert html.count("after 0 rounds: accuracy 58.1 %") == 1


def test_without_a_bound_nothing_speaks_of_it(page: Any) -> None:
    text = " ".join(page(bound=None)[1].text)
    assert "first-order bound" not in text
    assert "gap closed" not in text


def test_labels_of_near_reference_lines_stand_apart(page: Any) -> None:
    html = page(evaluations=[an_evaluation(0, 0.30, majority=0.31), an_evaluation(10, 0.8, majority=0.31)])[0]
    heights = {
        style: float(height) for height, style in re.findall(r'<text y="([\d.]+)" class="mark (before|majority)"', html)
    }
    assert heights["before"] - heights["majority"] > 12


def test_a_node_that_differs_is_marked(page: Any) -> None:
    text = page(nodes={"a": a_node(), "b": a_node(digest="aa" * 16)})[1].text
    assert "✗ 1 of 2" in text
    assert "✗ differs" in text


def test_gradip_is_a_line_a_node_and_early_stopped_ones_are_marked(page: Any) -> None:
    html, checker = page(**calibrated("node-3", "node-0", "node-1", "node-2"))
    assert len(re.findall(r'class="curve n\d( stopped)?"', html)) == 4
    assert len(re.findall(r'class="curve n\d stopped"', html)) == 1
    assert 'class="band calibration"' in html
    text = checker.text
    for words in (" node-3: early-stopped", " node-0", "rho_later (≥ 2.5)", "rho_quiet (≥ 0.5)", "4.25", "0.62"):
        assert words in text, words
    assert text.count("✗ early-stopped") == 1
    assert text.count("✓ all local steps") == 3
    assert "1 of 4 nodes early-stopped by vpcs: node-3" in " ".join(text)


def test_of_many_nodes_the_early_stopped_ones_are_drawn(page: Any) -> None:
    text = page(**calibrated("node-99", *(f"node-{index}" for index in range(30))))[1].text
    assert " node-99: early-stopped" in text
    assert " … and 15 more" in text


def test_without_gradip_nothing_speaks_of_it(page: Any) -> None:
    text = " ".join(page()[1].text)
    assert "GradIP" not in text
    assert "arly-stopped" not in text


def test_random_early_stopping_has_no_thresholds(page: Any) -> None:
    judgements = {"a": Judgement(0, "a", 0.0, 0.0, True), "b": Judgement(0, "b", 0.0, 0.0, False)}
    text = page(judgements=judgements, early_stopping=EarlyStoppingConfig(by="random"))[1].text
    assert {"rho_later", "verdict by random", "✗ early-stopped"} <= set(text)


def test_where_early_stopping_changes_nothing_the_page_says_so(page: Any) -> None:
    magnitudes = {"node-0": [(step, 0.1) for step in range(1, 10)]}
    html, checker = page(magnitudes=magnitudes, early_stopping=EarlyStoppingConfig(by="vpcs"))
    assert "Early stopping changes nothing at T = 1" in html
    assert "GradIP" not in " ".join(checker.text)


def test_at_one_local_step_there_is_no_gradip_card(page: Any) -> None:
    text = " ".join(page(magnitudes={"node-0": [(step, 0.1) for step in range(1, 10)]})[1].text)
    assert "GradIP" not in text


def test_counts_are_explained(page: Any) -> None:
    text = page(counts={"late": 2, "refused: outlier": 1, "misplaced: Want": 3})[1].text
    assert METRICS["late"] in text
    assert "far from those of the other nodes" in " ".join(text)
    assert METRICS["misplaced"] in text


@pytest.mark.parametrize("member", [*Reason, *(verdict for verdict in Verdict if verdict is not Verdict.ACCEPTED)])
def test_every_refusal_is_explained_by_its_own_words(member: Any) -> None:
    if member is not Verdict.EARLY_STOPPED:  # it counts as accepted
        assert meaning(f"refused: {in_words(member)}") != meaning("refused")
    assert "does not fit the server's theta" not in meaning(f"refused: {in_words(member)}")


def test_nodes_and_classes_have_colours_of_their_own(page: Any) -> None:
    html = page(**calibrated("node-3", "node-0", "node-1", "node-2"))[0]
    colours = dict(re.findall(r"--([cn]\d): (#[0-9a-f]{6});", html.split("prefers-color-scheme")[0]))
    assert len(colours) == len(set(colours.values())) == 16
    assert re.search(r'class="n0 stopped"|class="n0"', html)
    assert 'class="part c0"' in html


def test_on_a_phone_a_cell_says_its_column(page: Any) -> None:
    html = page()[0]
    for head in ("node", "updates", "sent", "received", "peak memory", "weights", "what", "times", "meaning"):
        assert f'<td data-label="{head}">' in html
    phone = html.split("@media (max-width: 560px)")[1]
    assert "content: attr(data-label)" in phone


@pytest.mark.parametrize(
    ("standing", "words"),
    [
        (Standing.FINISHED, "Fine-tuned by 4 nodes over MQTT in 1 min 52 s"),
        (Standing.RUNNING, "Running: 40 of 300 rounds by 4 nodes over MQTT in 1 min 52 s"),
        (Standing.INTERRUPTED, "Interrupted: 40 of 300 rounds"),
        (Standing.UNKNOWN, "Not known to run: 40 of 300 rounds"),
    ],
)
def test_it_says_how_the_run_stands_and_when(page: Any, standing: Standing, words: str) -> None:
    text = " ".join(page(standing=standing, closed=40)[1].text)
    assert words in text
    assert "2026-11-28 19:20 UTC" in text


def test_a_warning_is_seen(page: Any) -> None:
    html, checker = page(warning="the loss rises; lower rounds.lr")
    assert 'role="alert"' in html
    assert "Warning: the loss rises; lower rounds.lr." in checker.text
    assert "Warning" not in page()[1].text


def test_what_is_not_known_is_left_out(page: Any) -> None:
    nodes = {"a": NodeReport(updates=3, rows=9, sent_bytes=312, proven=2)}
    html = page(nodes=nodes, digest="", parameters=None, covered=None, counts={})[0]
    text = re.sub("<[^>]*>", " ", html.partition("</style>")[2])
    for word in ("received", "peak memory", "all weights", "Data on the nodes", "of all"):
        assert word not in text
    assert "Sent by a node" in text
    assert "✓ at version 2" in text


def test_lines_of_a_template_are_kept(page: Any) -> None:
    assert "{line}\nTriage:" in page()[1].text


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        write_report(tmp_path / "missing" / "report.html", a_report())
