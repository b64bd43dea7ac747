"""The error tree is what its docstring and the documentation say."""

import pickle
import re
from pathlib import Path

import pytest

from meerkat_mq import errors
from meerkat_mq.errors import MeerkatError, NodeReplaced, shown, within


def tree() -> list[tuple[int, type[MeerkatError]]]:
    """All classes with their depth, in the order of definition."""

    def below(kind: type[MeerkatError], depth: int) -> list[tuple[int, type[MeerkatError]]]:
        return [(depth, kind), *(found for child in kind.__subclasses__() for found in below(child, depth + 1))]

    return below(MeerkatError, 0)


def test_the_docstring_draws_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn = re.findall(r"^([│├└─ ]*)([A-Z]\w+)\b *(\d)?", errors.__doc__, re.MULTILINE)
    lines = [(len(lead) // 4, name, int(code) if code else None) for lead, name, code in drawn if name != "The"]
    found = [(depth, kind.__name__, kind.exit_code if "exit_code" in vars(kind) else None) for depth, kind in tree()]
    assert lines == found


def test_the_documentation_lists_each_exit_code() -> None:
    table = Path(__file__).parents[1].joinpath("docs", "errors.md").read_text(encoding="utf-8")
    documented = {int(code) for code in re.findall(r"^\| (\d) \|", table, re.MULTILINE)}
    assert documented == {0, *(kind.exit_code for _, kind in tree())}


@pytest.mark.parametrize("kind", [kind for _, kind in tree()])
def test_every_error_says_where_what_and_what_to_do(kind: type[MeerkatError]) -> None:
    error = kind("there", "is wrong", "mend it")
    assert str(error) == "there: is wrong; mend it"
    assert str(kind("there", "is wrong")) == "there: is wrong"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (kind, str(error))
    assert 1 <= kind.exit_code <= 7


def test_no_part_of_an_error_steers_a_terminal() -> None:
    error = MeerkatError("a\x1b[2J", "b\nc", "d\u202e\ud83d")
    assert all(part.isprintable() for part in (error.where, error.problem, error.remedy, str(error)))


def test_a_wider_place_goes_before() -> None:
    with pytest.raises(NodeReplaced, match=r"^file: key: is wrong; mend it$"), within("file"):
        raise NodeReplaced("key", "is wrong", "mend it")
    with pytest.raises(ValueError, match=r"^other$"), within("file"):
        raise ValueError("other")


def test_an_integer_of_more_digits_than_python_writes() -> None:
    """TOML has such integers, as 0xff…; the limit is on decimal digits alone."""
    for value in (2**20_000, -(2**20_000), [2**20_000], {"a": (1, 2**20_000)}):
        assert "an integer of 20001 bits" in shown(value)
