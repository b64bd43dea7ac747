"""The longest step of a run: from the first update on, carried by descriptor and ledger, recomputed by `verify`."""

import math
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meerkat_mq.config import GuardsConfig, ServerConfig
from meerkat_mq.core.path import digest
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.errors import RunMismatch
from meerkat_mq.ledger.displacement import verdict_on
from meerkat_mq.ledger.folder import verify_folder
from meerkat_mq.ledger.run import Run, check_same, trust_in_words
from meerkat_mq.rounds.guards import on_arrival
from meerkat_mq.rounds.records import Verdict
from meerkat_mq.server.run import prepare_run
from meerkat_mq.wire.frames import encode
from meerkat_mq.wire.messages import Header, Update
from tests.ledger.ledgers import begin_chain_again, write
from tests.server.federation import TOPICS, Federation
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(150)


def prepared(tmp_path: Path, begun: Run | None = None, **guards: float) -> Run:
    table = {"federation": "f", "state_dir": tmp_path, "engine": "toy", "guards": guards}
    return prepare_run(ServerConfig.model_validate(table), begun.descriptor if begun else None)


def test_a_run_carries_its_longest_step(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    assert run.descriptor.max_step == run.settings.max_step == GuardsConfig().max_step * run.mask.scale
    assert prepared(tmp_path, max_step=0.25).descriptor.max_step == 0.25
    free = prepared(tmp_path, max_step=0)
    assert free.descriptor.max_step is None
    assert (free.settings.max_step, free.settings.reach(3)) == (2.0**64, math.inf)
    assert b"max_step" not in free.descriptor.encode()


def test_the_longest_step_is_fixed_and_an_older_run_goes_on_without(tmp_path: Path) -> None:
    begun = prepared(tmp_path, max_step=2.0)
    check_same(prepared(tmp_path, begun, max_step=2.0), begun.descriptor, begun.rules, "ledger")
    with pytest.raises(RunMismatch, match=r"guards\.max_step: the run was begun with 2\.0, the config.* 3\.0"):
        check_same(prepared(tmp_path, begun, max_step=3.0), begun.descriptor, begun.rules, "ledger")
    older = replace(begun, descriptor=begun.descriptor.model_copy(update={"max_step": None}))
    again = prepared(tmp_path, older)
    assert again.descriptor.max_step is None
    check_same(again, older.descriptor, again.rules, "ledger")


@pytest.mark.parametrize("g", [1e20, 1e15, 3.0, -3.0])
def test_a_first_update_over_the_bound_is_refused(g: float) -> None:
    assert on_arrival((0.5, g), 1.0, 0.5, 1.25) is Verdict.TOO_LARGE
    assert on_arrival((0.5, 2.5), 1.0, 0.5, 1.25) is Verdict.ACCEPTED


def test_a_displacement_over_the_bound_is_refused() -> None:
    moved = np.full(100, 0.5, np.float32)
    assert verdict_on(moved, 1.0, 0.5) is Verdict.ACCEPTED
    assert verdict_on(moved, 1.0, 0.49) is Verdict.TOO_LARGE
    assert verdict_on(moved, 1.0) is Verdict.ACCEPTED


def test_verify_recomputes_the_bound_and_what_it_refuses(tmp_path: Path) -> None:
    """A ledger as of a server that carries a bound, and took an update over it."""

    writer = write(tmp_path, count=3)
    assert verify_folder(tmp_path).rounds == 3
    bounded = writer.run.model_copy(update={"max_step": GuardsConfig().max_step})
    assert_verified(tmp_path, bounded.model_dump_json())
    with pytest.raises(RunMismatch, match=r"its max_step is 49\.0; its rules and mask give 50\.0"):
        assert_verified(tmp_path, bounded.model_copy(update={"max_step": 49.0}).model_dump_json())
    short = bounded.model_copy(update={"max_step": 0.001})
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as connection, connection:
        connection.execute("UPDATE run SET rules = json_set(rules, '$.guards.max_step', 0.001)")
    with pytest.raises(RunMismatch, match=r"entry 0: its update of n\d is kept as accepted, but is too large"):
        assert_verified(tmp_path, short.model_dump_json())


def assert_verified(folder: Path, descriptor: str) -> None:

    with closing(sqlite3.connect(folder / "ledger.sqlite")) as connection, connection:
        connection.execute("UPDATE run SET descriptor = ?", (descriptor,))
    begin_chain_again(folder)
    verify_folder(folder)


def test_what_few_updates_mean_is_said(tmp_path: Path) -> None:
    settings = prepared(tmp_path).settings
    assert (settings.fewest_nodes, settings.min_updates, trust_in_words(settings)) == (3, 3, "")
    said = trust_in_words(settings.model_copy(update={"min_updates": 1}))
    assert said.startswith("rounds.min_updates = 1: a round may close with fewer than 3 updates")


@pytest.mark.parametrize("g", [1e20, 1e15])
async def test_the_first_comer_alone_ruins_nothing(federation: Federation, g: float) -> None:
    """Not where the run has opted out either: its update is refused, and the nodes that come later train the model."""
    server = federation.server(rounds={"count": 20, "min_updates": 1, "deadline_s": 0.2, "lr": 0.05}, toy_weights=50)
    await federation.eye.follows(1)
    run = federation.eye.runs[-1]
    await federation.ghost(name="evil")
    await until(lambda: federation.eye.rounds and federation.eye.rounds[-1].is_open)
    header = Header.of(run.run_id, 1, 0, run.mask_hash)
    evil = Update(header, 1, digest(toy_mask(50).theta_0)[:8], 0.5, (g,))
    await federation.eye.session.publish(TOPICS.up("evil", "update"), encode(evil))
    await server.says("refused: too large", node="evil")
    nodes = [federation.node(f"node-{number}", exit_when_finished=True) for number in range(2)]
    for node in nodes:
        assert await node.ended() == 0, node.plain
    server.stop()
    assert await server.ended() == 0
    assert np.abs(federation.difference().theta).max() < 10


async def test_by_default_nobody_trains_alone(federation: Federation) -> None:
    server = federation.server(rounds={"count": 5, "min_updates": 3, "min_nodes": 1, "deadline_s": 1.0})
    nodes = [federation.node(f"node-{number}", exit_when_finished=True) for number in range(2)]
    await server.says("waiting for nodes", online=2, min_nodes=3)
    assert not server.said("round closed")
    nodes.append(federation.node("node-2", exit_when_finished=True))
    for node in nodes:
        assert await node.ended() == 0, node.plain
    assert not server.said("nothing compares updates")
