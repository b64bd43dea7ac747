"""Two hostile nodes of seven on a real broker: each step stays within what the honest nodes say (H1, H9, H10).

And what decided that is replayed: the verdicts of the guards and the clipping are recomputed by `verify`.
"""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from pydantic import ValidationError

from meerkat_mq.config import GuardsConfig, RoundsConfig, ServerConfig
from meerkat_mq.core.path import digest
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.errors import RunMismatch
from meerkat_mq.ledger.folder import verify_folder
from meerkat_mq.ledger.run import as_begun, check_same, kept_guards_in_words
from meerkat_mq.rounds.clipping import SIGMAS
from meerkat_mq.server.run import prepare_run
from meerkat_mq.wire.frames import encode
from meerkat_mq.wire.messages import Header, Round, Update
from tests.server.federation import TOPICS, Federation
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(200)

ROUNDS, LR = 12, 0.05


async def push(federation: Federation, name: str, scalar: Callable[[int], float]) -> None:
    """Send one's update for each version until the run is over."""
    eye = federation.eye
    await federation.ghost(name=name)
    run = eye.runs[-1]
    for version in range(ROUNDS):

        def is_open(wanted: int = version) -> bool:
            newest: Round | None = eye.rounds[-1] if eye.rounds else None
            return newest is not None and newest.is_open and newest.header.version == wanted

        await until(is_open)
        base = digest(toy_mask(50).theta_0) if version == 0 else await eye.digest(version)
        header = Header.of(run.run_id, eye.rounds[-1].header.term, version, run.mask_hash)
        eye.session.publish(TOPICS.up(name, "update"), encode(Update(header, 1, base[:8], 0.5, (scalar(version),))))
        await eye.session.drain(30)


async def test_a_pair_that_pushes_one_way_moves_no_step_beyond_the_honest(federation: Federation) -> None:
    rules = {"count": ROUNDS, "min_nodes": 6, "quorum": 1.0, "lr": LR, "deadline_s": 20.0, "directions": 1}
    server = federation.server(rounds=rules, toy_weights=50)
    nodes = [federation.node(f"node-{number}", exit_when_finished=True) for number in range(5)]
    await federation.eye.follows(1)
    await push(federation, "evil", lambda version: 900.0 if version > 8 else 10.0 * (1 + version))
    for node in nodes:
        assert await node.ended() == 0, node.plain
    server.stop()
    assert await server.ended() == 0
    folder = server.config.parent / "server"
    with federation.ledger() as ledger:
        assert ledger.rules["rounds"]["aggregate"] == "clipped-mean"
        for entry in ledger.entries(0, ROUNDS):
            honest = [one.scalars[0] for one in ledger.records(entry.version) if one.node != "evil"]
            spread = max(honest) - min(honest)
            for term in entry.terms:
                assert min(honest) <= term.coefficient / LR + 1e-6 * (1 + spread)
                assert term.coefficient / LR <= max(honest) + SIGMAS * spread / 6 + 1e-6
    assert verify_folder(folder).rounds == ROUNDS
    with closing(sqlite3.connect(folder / "ledger.sqlite")) as connection, connection:
        connection.execute("UPDATE run SET rules = json_set(rules, '$.guards.outlier', 1e9)")
    with pytest.raises(RunMismatch, match="is kept as outlier, but is accepted"):
        verify_folder(folder)


def test_a_run_keeps_the_aggregate_and_the_guards_that_it_was_begun_with(tmp_path: Path) -> None:
    table = {"federation": "f", "state_dir": tmp_path, "engine": "toy"}
    older = ServerConfig.model_validate(table | {"rounds": {"aggregate": "mean"}})
    newer = ServerConfig.model_validate(table)
    assert newer.rounds.aggregate == "clipped-mean"
    begun = prepare_run(older)
    again = prepare_run(as_begun(newer, begun.rules), begun.descriptor)
    assert again.settings.aggregate == "mean"
    check_same(again, begun.descriptor, begun.rules, "ledger")
    named = ServerConfig.model_validate(table | {"rounds": {"aggregate": "clipped-mean"}})
    with pytest.raises(RunMismatch, match=r"rounds\.aggregate: the run was begun with 'mean'"):
        check_same(prepare_run(as_begun(named, begun.rules), begun.descriptor), begun.descriptor, begun.rules, "ledger")

    fresh, changed = prepare_run(newer), newer.model_copy(update={"guards": GuardsConfig(window=30, max_step=3)})
    kept = as_begun(changed, fresh.rules).guards
    assert kept == GuardsConfig(max_step=3)  # verify replays the others; a changed longest step is refused elsewhere
    looser = older.model_copy(update={"guards": GuardsConfig(window=30)})
    assert as_begun(looser, begun.rules).guards.window == 30
    assert RoundsConfig().aggregate == "clipped-mean"

    trusting = prepare_run(ServerConfig.model_validate(table | {"guards": {"trusted": ["node-7"]}}))
    assert prepare_run(as_begun(newer, trusting.rules), trusting.descriptor).settings.guards.trusted == ("node-7",)
    with pytest.raises(ValidationError, match=r'needs rounds\.aggregate = "clipped-mean"'):
        ServerConfig.model_validate(table | {"guards": {"trusted": ["node-7"]}, "rounds": {"aggregate": "mean"}})


def test_a_changed_guard_without_effect_is_named_with_a_remedy() -> None:
    kept, asked = GuardsConfig(window=30), GuardsConfig(trusted=("node-7",))
    window, trusted = kept_guards_in_words(kept, asked)
    assert window.startswith("guards.window: the run was begun with 30, and 50 has no effect on it; put the old value")
    assert trusted.startswith("guards.trusted: the run was begun with [], and ['node-7'] has no effect")
    assert trusted.endswith("or name another state_dir for a new run")
    assert kept_guards_in_words(kept, kept) == []
