"""JSON from somebody else: whatever is wrong with it is one kind of error, and costs no more than its size."""

import json
import time

import pytest

from meerkat_mq.core.foreign import parse_json


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "\x00", b"\xff\xfe\xfd", "9" * 5000, "[" * 100_000, '{"a":' * 100_000,
        '{"a": 1, "a": 1}', '[{"b": {"a": 1, "a": 2}}]',
    ],
)  # fmt: skip
def test_what_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(text)


def test_the_others_are_what_they_say() -> None:
    assert parse_json(b'{"a": [1, 2.5, "\\u00e9", null, true]}') == {"a": [1, 2.5, "é", None, True]}


def test_a_key_that_comes_twice_among_many_is_found_at_once() -> None:
    text = json.dumps({f"{number}": 0 for number in range(200_000)})[:-1] + ', "199999": 0}'
    began = time.process_time()
    with pytest.raises(ValueError, match="'199999' comes twice"):
        parse_json(text)
    assert time.process_time() - began < 10  # one count after the other: 200,000² comparisons, minutes
