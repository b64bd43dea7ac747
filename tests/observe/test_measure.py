"""What a run is judged by: accuracy or perplexity, on the terminal, in the status, and on the page."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from meerkat_mq.observe.events import Evaluated
from meerkat_mq.observe.live import Live
from meerkat_mq.observe.measure import ACCURACY, PERPLEXITY, beside, measure_of
from meerkat_mq.observe.page import write_report
from meerkat_mq.observe.summary import print_summary
from meerkat_mq.observe.tables import status_line, status_table
from tests.observe.made_up import a_node, a_report
from tests.observe.test_tables import RUN, text


def of_texts(version: int, perplexity: float) -> Evaluated:
    figures = {"loss": math.log(perplexity), "perplexity": perplexity, "token_accuracy": 0.4, "exact_match": 0.0}
    return Evaluated(version=version, rows=200, figures=figures)


LEARNT: dict[str, Any] = {
    "evaluations": [of_texts(0, 40.0), of_texts(150, 30.0), of_texts(300, 25.0)],
    "bound": 20.0,
    "classes": (),
    "nodes": {"node-0": a_node(labels=(), rows=12)},
}


def test_what_a_run_is_judged_by() -> None:
    assert measure_of({"accuracy": 0.5, "loss": 1.0}) is ACCURACY
    assert measure_of({"perplexity": 3.0, "token_accuracy": 0.5, "loss": 1.0}) is PERPLEXITY
    assert measure_of({"loss": 1.0}) is measure_of({"accuracy": math.nan}) is measure_of({"accuracy": None}) is None


def test_how_it_is_shown() -> None:
    assert (ACCURACY.shown(0.581), ACCURACY.change(0.5, 0.25)) == ("58.1 %", "−25.0 points")
    assert (PERPLEXITY.shown(1234.5), PERPLEXITY.change(40, 25)) == ("1,234.50", "−37.5 %")
    assert beside({"loss": 1, "accuracy": 1, "balanced_accuracy": 0.5, "macro_f1": 0.25}) == (
        "balanced accuracy 50.0 %, macro-F1 25.0 %"
    )


def test_the_summary_and_the_gap() -> None:
    console = Console(file=(out := io.StringIO()), width=100)
    print_summary(console, a_report(**LEARNT))
    said = " ".join(out.getvalue().split())
    assert "held-out perplexity 25.00: −37.5 %, from 40.00 tokens right 40.0 %, exact matches 0.0 %" in said
    assert "of the gap closed 75 %: first-order training on the same mask reaches 20.00" in said
    assert a_report(**LEARNT | {"bound": 45.0}).gap_closed is None


def test_the_page(tmp_path: Path) -> None:
    write_report(tmp_path / "page.html", a_report(**LEARNT))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for words in ("Held-out perplexity over rounds", "first-order bound 20.00", "before 40.00"):
        assert words in page
    assert "accuracy" not in page.replace("token accuracy", "")


def test_the_status() -> None:
    figures = {"perplexity": 25.0, "token_accuracy": 0.4, "loss": 3.2}
    run = RUN.__class__(**{**_fields(RUN), "accuracy": None, "figures": figures, "base_figures": {"perplexity": 40.0}})
    first = " ".join(text(status_table(run), 120).splitlines()[0].split())
    assert first == "perplexity 25.00 after 40 rounds, −37.5 % from 40.00; tokens right 40.0 %"
    assert "perplexity 25.00, loss 0.25" in status_line(run)
    unknown = RUN.__class__(**{**_fields(RUN), "accuracy": None, "figures": {}, "evaluated": None})
    assert "not measured" in text(status_table(unknown), 120).splitlines()[0]
    assert "accuracy" not in status_line(unknown)


def _fields(run: Any) -> dict[str, Any]:
    return {name: getattr(run, name) for name in run.__dataclass_fields__}


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"loss": 3.0, "perplexity": 20.0}, "perplexity 20.00 on 5 held-out rows"),
        ({"loss": 3.0}, "held-out loss 3.0000 on 5 held-out rows"),
    ],
)
def test_on_the_way(figures: dict[str, float], said: str) -> None:
    console = Console(file=(out := io.StringIO()), width=120)
    with Live(console, rounds=10, nodes=2) as live:
        live(Evaluated(version=0, rows=5, figures=figures))
    assert f"0 of 10 rounds: {said}" in out.getvalue()
