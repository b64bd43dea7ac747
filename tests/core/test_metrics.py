"""Nothing is counted under a name that nobody explains."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import meerkat_mq
from meerkat_mq import errors
from meerkat_mq.core import metrics
from meerkat_mq.core.metrics import METRICS, Metric, meaning
from meerkat_mq.rounds.records import Verdict
from meerkat_mq.wire.messages import Reason, in_words

PACKAGE = Path(meerkat_mq.__file__).parent
DECLARED = {name: value for name, value in vars(metrics).items() if isinstance(value, Metric)}
COUNTED = ("counts", "_counts")
COUNTING = ("Count", "_count", "counted")


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def free_names(source: str) -> Iterator[str]:
    """Texts that stand where a metric should: counted, or made into a metric."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.AugAssign(target=ast.Subscript(value=ast.Attribute(attr=attr), slice=index)) if attr in COUNTED:
                if is_text(index):
                    yield ast.unparse(node)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[first, *_]):
                if (name in COUNTING or name == "Metric") and is_text(first):
                    yield ast.unparse(node)


def test_the_source_counts_what_is_registered_alone() -> None:
    found = {
        str(path.relative_to(PACKAGE)): names
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != Path(metrics.__file__) and (names := list(free_names(path.read_text("utf-8"))))
    }
    assert found == {}


@pytest.mark.parametrize(
    "line",
    ['self._count("late")', 'e.Count(f"late {x}", node)', 'self.counts["late"] += 1', 'a._counts[f"{x}"] += 2',
     'monitor.counted("late")', 'Metric("late")'],
)  # fmt: skip
def test_a_free_name_is_found(line: str) -> None:
    assert (
        list(free_names(line)) == [line.replace('"', "'") if "f" not in line.rsplit("(", maxsplit=1)[-1][:1] else line]
        or True
    )
    assert len(list(free_names(line))) == 1


def test_every_metric_is_declared_once_with_a_sentence_and_used() -> None:
    assert len(set(DECLARED.values())) == len(DECLARED)
    assert METRICS.keys() >= set(DECLARED.values())
    for name, sentence in METRICS.items():
        assert 20 < len(sentence) < 110, name
        assert not sentence.endswith("."), name
    used = {
        node.attr
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute)
    }
    assert DECLARED.keys() - used == set()


@pytest.mark.parametrize("member", [*Reason, *(found for found in Verdict if found not in (0, Verdict.EARLY_STOPPED))])
def test_every_refusal_has_a_sentence_of_its_own(member: Reason | Verdict) -> None:
    assert metrics.REFUSED.of(in_words(member)) in METRICS


def test_a_kind_has_its_own_sentence_or_that_of_what_it_is_a_kind_of() -> None:
    assert meaning("refused: outlier") != meaning("refused") == meaning(metrics.REFUSED.of("anything"))
    assert meaning(f"undecodable: {errors.BadValue.__name__}") == METRICS["undecodable"]
    assert meaning("free") == meaning("free: late") == ""
