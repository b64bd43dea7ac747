"""Early stopping over MQTT: nodes are judged, asked for less, and a killed server forgets nothing of it."""

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meerkat_mq.config import ServerConfig
from meerkat_mq.core.mask import Mask, MaskedMatrix
from meerkat_mq.errors import ConfigError, RunMismatch
from meerkat_mq.ledger.inspect import run_shown
from meerkat_mq.ledger.run import Run, check_same, early_stopping_in_words, settings_of
from meerkat_mq.ledger.verify import run_of
from meerkat_mq.rounds.records import Verdict
from meerkat_mq.server.run import prepare_run
from tests.server.federation import Federation, Service, all_end
from tests.server.replay import verified
from tests.server.test_kills import ALL, start_nodes

pytestmark = pytest.mark.timeout(150)

ROUNDS: dict[str, Any] = ALL | {"local_steps": 10, "count": 9}
LOW = {"by": "vpcs", "rho_later": 1e-6, "rho_quiet": 1.0, "require": "either"}  # flags whoever moves at all
RANDOM = {"by": "random", "random_share": 0.3}


def start(federation: Federation, *flags: str, early: dict[str, Any], **settings: Any) -> Service:
    early = early | {"calibration_steps": 20, "steps": 2, "every": 6}
    return federation.server(*flags, rounds=ROUNDS, toy_weights=40, early_stopping=early, **settings)


@pytest.mark.parametrize(
    ("early", "flagged", "life"),
    [(LOW, 3, "updates after 1"), (LOW, 3, "entry after 1"), (RANDOM, 1, "entry before 1")],
    ids=["vpcs, in", "vpcs, after", "random, in"],
)
async def test_a_server_killed_in_or_after_a_calibration_goes_on_with_its_judgements(
    federation: Federation, early: dict[str, Any], flagged: int, life: str
) -> None:
    nodes = start_nodes(federation)
    first = start(
        federation, "--once", early=early, module="tests.server.killed", environment={"MEERKAT_KILL": life}
    )  # fmt: skip
    assert await first.ended() == -signal.SIGKILL, first.plain
    second = start(federation, "--once", early=early)
    assert await all_end(second, *nodes) == [0] * 4, [service.plain for service in (second, *nodes)]
    with federation.ledger() as ledger:
        theta, rules = verified(ledger), settings_of(run_of(ledger), ledger.rules)
        stopped = [{found.node for found in ledger.judgements(version) if found.early_stopped} for version in range(9)]
        assert [len(nodes) for nodes in stopped] == [flagged, 0, 0, 0, 0, 0, flagged, 0, 0]
        for version in range(9):
            calibrates, newest = version in (0, 6), stopped[0] if version < 6 else stopped[6]
            for record in ledger.records(version):
                is_short = record.node in newest and not calibrates
                assert len(record.scalars) == (20 if calibrates else 2 if is_short else 10), (version, record.node)
                early_stopped = record.verdict is Verdict.EARLY_STOPPED
                assert early_stopped == (calibrates and record.node in stopped[version])
        assert [len(ledger.products(version, rules) or ()) for version in range(9)] == [2] * 9
        since = {node: 0 if node in stopped[0] else 6 for node in stopped[6]}
        assert ledger.early_stopped_since() == since
        shown = run_shown(ledger)
    assert {node.node: node.early_stopped_since for node in shown.nodes if node.node in since} == since
    assert all(node.gradip is not None and node.judged == 6 for node in shown.nodes)
    assert {service.said("finished")[0]["digest"] for service in nodes} == {theta.hex()}
    (line,) = second.said("early stopping")
    assert line["how"] == f"by {early['by']}, judged in round 0 by 20 local steps, again every 6 rounds"


@pytest.mark.parametrize(
    ("early", "steps", "words"),
    [
        ({}, 10, ""),
        ({"by": "random", "steps": 10}, 10, "by random: filtering changes nothing at local_steps = 10"),
        ({"by": "vpcs"}, 2, "by vpcs, judged in round 0 by 200 local steps"),
        ({"by": "vpcs", "every": 50}, 2, "by vpcs, judged in round 0 by 200 local steps, again every 50 rounds"),
    ],
)
def test_what_early_stopping_does_in_words(tmp_path: Path, early: dict[str, Any], steps: int, words: str) -> None:
    assert early_stopping_in_words(prepared(tmp_path, {"local_steps": steps}, early).settings) == words


def prepared(folder: Path, rounds: dict[str, Any], early: dict[str, Any]) -> Run:
    table = {"federation": "f", "state_dir": folder, "engine": "toy", "rounds": rounds, "early_stopping": early}
    return prepare_run(ServerConfig.model_validate(table))


@pytest.mark.parametrize(
    ("rounds", "early", "words"),
    [
        ({}, {"by": "off"}, "early_stopping.by: the run was begun with 'vpcs', the configuration says 'off'"),
        ({}, {"by": "vpcs", "quiet": 0.3}, "early_stopping.quiet: the run was begun with 0.2, the configuration"),
        ({}, {"by": "vpcs", "every": 5}, "early_stopping.every: the run was begun with 0, "),
        ({"perturbations": 2}, {"by": "vpcs"}, "rounds.perturbations: the run was begun with 1, "),
    ],
)
def test_its_rules_are_fixed(tmp_path: Path, rounds: dict[str, Any], early: dict[str, Any], words: str) -> None:
    begun = prepared(tmp_path, {"local_steps": 10}, {"by": "vpcs"})
    now = prepared(tmp_path, {"local_steps": 10, **rounds}, early)
    check_same(begun, begun.descriptor, begun.rules, "l")
    same = replace(now, descriptor=now.descriptor.model_copy(update={"run": begun.descriptor.run}))
    with pytest.raises(RunMismatch, match=f"l: {words}"):
        check_same(same, begun.descriptor, begun.rules, "l")


def test_where_it_is_off_its_thresholds_may_change(tmp_path: Path) -> None:
    begun, now = prepared(tmp_path, {}, {}), prepared(tmp_path, {}, {"quiet": 0.3})
    same = replace(now, descriptor=now.descriptor.model_copy(update={"run": begun.descriptor.run}))
    check_same(same, begun.descriptor, begun.rules, "l")


def test_judging_by_a_gradient_that_there_is_not(tmp_path: Path) -> None:
    zeros = np.zeros(4, dtype=np.float32)
    mask = Mask((MaskedMatrix("m", (4,), np.arange(4, dtype=np.uint32), zeros, zeros),), bytes(32), bytes(32))
    mask.save(tmp_path / "m.mkm")
    table = {"federation": "f", "state_dir": tmp_path, "mask": tmp_path / "m.mkm", "task": "sst2"}
    assert prepare_run(ServerConfig.model_validate(table)).settings.measured is False
    with pytest.raises(ConfigError, match=r"early_stopping\.by: vpcs needs the pre-training gradient"):
        prepare_run(ServerConfig.model_validate(table | {"early_stopping": {"by": "vpcs"}}))


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        (
            {"local_steps": 600, "perturbations": 2},
            "rounds: local_steps × perturbations = 1200 exceeds 1000; lower one",
        ),
        (
            {"local_steps": 1000, "directions": 13, "min_nodes": 13},
            "rounds: directions × local_steps × perturbations = ",
        ),
    ],
)
def test_more_steps_than_a_round_takes(tmp_path: Path, rounds: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        prepared(tmp_path, rounds, {})
