"""What of a buffered run or one with values nodes is fixed at its first start, and how it is said."""

import json
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.config import KeptRules, ServerConfig, check_config
from meerkat_mq.errors import ConfigError, RunMismatch
from meerkat_mq.ledger.run import Run, as_begun, check_same, mode_in_words, settings_of
from meerkat_mq.server.run import prepare_run

BUFFERED: dict[str, Any] = {"mode": "buffered", "max_staleness": 4}
CLOSE = "close a version, from theta up to 4 versions old; one that is τ versions old weighs"
ACCEPT: dict[str, Any] = {"accept": True}


def prepared(tmp_path: Path, rounds: dict[str, Any], values: dict[str, Any]) -> Run:
    table = {"federation": "f", "state_dir": tmp_path, "engine": "toy", "rounds": rounds, "values": values}
    return prepare_run(ServerConfig.model_validate(table))


def test_a_run_says_what_it_takes(tmp_path: Path) -> None:
    plain, buffered = prepared(tmp_path, {}, {}), prepared(tmp_path, BUFFERED, ACCEPT | {"codec": "int8"})
    assert (plain.descriptor.mode, plain.descriptor.max_staleness, plain.descriptor.values) == ("synchronous", 0, False)
    assert (plain.settings.buffered, plain.settings.max_staleness, plain.settings.values.accept) == (False, 0, False)
    run = buffered.descriptor
    assert (run.mode, run.max_staleness, run.values) == ("buffered", 4, True)
    settings = buffered.settings
    assert (settings.buffered, settings.max_staleness, settings.values.accept) == (True, 4, True)
    assert (buffered.codec, plain.codec) == ("int8", "bfloat16")


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        ({}, ""),
        (BUFFERED, f"buffered: 8 updates {CLOSE} 1/(1+τ)^0.5"),
        (BUFFERED | {"staleness": "constant", "buffer_size": 3}, f"buffered: 3 updates {CLOSE} 1"),
    ],
)
def test_how_it_closes_in_words(tmp_path: Path, rounds: dict[str, Any], words: str) -> None:
    assert mode_in_words(prepared(tmp_path, rounds, {}).settings) == words


@pytest.mark.parametrize(
    ("rounds", "values", "key"),
    [
        ({}, ACCEPT, "rounds.m"),
        (BUFFERED | {"max_staleness": 5}, ACCEPT, "rounds.max_staleness"),
        (BUFFERED | {"staleness": "constant"}, ACCEPT, "rounds.staleness"),
        (BUFFERED | {"staleness_exponent": 0.75}, ACCEPT, "rounds.staleness_exponent"),
        (BUFFERED, {}, "values.accept"),
        (BUFFERED, ACCEPT | {"codec": "float32"}, "values.codec"),
    ],
)
def test_what_changes_the_arithmetic_is_fixed(
    tmp_path: Path, rounds: dict[str, Any], values: dict[str, Any], key: str
) -> None:
    begun = prepared(tmp_path, BUFFERED, ACCEPT)
    again = prepare_again(tmp_path, begun, rounds, values)
    with pytest.raises(RunMismatch) as caught:
        check_same(again, begun.descriptor, begun.rules, "ledger.sqlite")
    assert f"ledger.sqlite: {key}" in caught.value.where


def prepare_again(tmp_path: Path, begun: Run, rounds: dict[str, Any], values: dict[str, Any]) -> Run:
    table = {"federation": "f", "state_dir": tmp_path, "engine": "toy", "rounds": rounds, "values": values}
    return prepare_run(ServerConfig.model_validate(table), begun.descriptor)


def test_the_rest_may_change(tmp_path: Path) -> None:
    begun = prepared(tmp_path, BUFFERED, ACCEPT)
    check_same(
        prepare_again(tmp_path, begun, BUFFERED | {"buffer_size": 3}, ACCEPT), begun.descriptor, begun.rules, "x"
    )
    plain = prepared(tmp_path, {}, {})
    check_same(prepare_again(tmp_path, plain, {}, {"codec": "int8"}), plain.descriptor, plain.rules, "x")


def test_more_directions_than_an_entry_holds_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_staleness \+ 1\) = 21021 exceeds [0-9]+; lower one of them"):
        prepared(tmp_path, {"mode": "buffered", "max_staleness": 1000, "local_steps": 21}, {})


@pytest.mark.parametrize("named", [{}, {"displacement_reach": 0.25}])
def test_a_run_that_is_older_than_a_key_has_the_rule_from_before_it(tmp_path: Path, named: dict[str, Any]) -> None:
    new = prepared(tmp_path, {}, ACCEPT)
    assert new.settings.displacement_reach == 0.25
    stored = json.loads(json.dumps(new.rules))
    del stored["rounds"]["displacement_reach"], stored["guards"]["takes_back"]
    older = check_config(stored, KeptRules, where="").kept
    assert settings_of(new.descriptor, older).guards.takes_back == 0
    assert settings_of(new.descriptor, older).displacement_reach is None
    table = {"federation": "f", "state_dir": tmp_path, "engine": "toy", "rounds": named, "values": ACCEPT}
    again = prepare_run(as_begun(ServerConfig.model_validate(table), older), new.descriptor)
    if not named:
        check_same(again, new.descriptor, older, "x")
        assert again.settings.displacement_reach is None
        return
    with pytest.raises(RunMismatch, match="displacement_reach: the run was begun with None"):
        check_same(again, new.descriptor, older, "x")
