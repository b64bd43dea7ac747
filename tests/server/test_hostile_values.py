"""A hostile values node on a real broker is flagged within a few rounds, and the model learns from the others (H11).

What decided that is replayed: `verify` recomputes what was measured of each displacement, and the verdicts.
"""

import sqlite3
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from meerkat_mq.core import metrics as m
from meerkat_mq.core.directions import direction
from meerkat_mq.core.metrics import METRICS
from meerkat_mq.errors import RunMismatch
from meerkat_mq.ledger.folder import verify_folder
from meerkat_mq.ledger.inspect import run_shown
from meerkat_mq.observe.figures import log_keys
from meerkat_mq.rounds.records import Verdict
from tests.server.federation import Federation, Service, all_end
from tests.support.command import Meerkat

pytestmark = pytest.mark.timeout(150)

ROUNDS: dict[str, Any] = {"count": 12, "quorum": 1.0, "deadline_s": 60.0, "local_steps": 10, "directions": 1}
WEIGHTS = 400
UPLINK: dict[str, Any] = {"uplink": "values", "values": {"codec": "float32", "lr": 0.02}}


def start(federation: Federation, hostile: str, *, paths: int, honest: int, **sections: Any) -> list[Service]:
    rounds = ROUNDS | {"min_nodes": paths + honest + 1}
    server = federation.server("--once", rounds=rounds, toy_weights=WEIGHTS, values={"accept": True}, **sections)
    nodes = [federation.node(f"path-{number}", exit_when_finished=True) for number in range(paths)]
    nodes += [federation.node(f"values-{number}", exit_when_finished=True, **UPLINK) for number in range(honest)]
    evil = federation.node(
        "evil", exit_when_finished=True, module="tests.server.hostile_values",
        environment={"MEERKAT_HOSTILE": hostile}, **UPLINK,
    )  # fmt: skip
    return [server, *nodes, evil]


def loss(federation: Federation) -> float:
    """Of the model; 1 before the first round."""
    return float(np.mean(np.square(federation.difference().theta - direction("mk1", 7, 0, WEIGHTS))))


def shortened(server: Service) -> set[str]:
    """The nodes of whom the server has said it: honest ones can be among them, in the order in which they answered."""
    return {line["node"] for line in server.said("displacement shortened")}


def counted(server: Service) -> dict[str, int]:
    """What the server has counted in all, as the log's last line says."""
    (line,) = server.said("run finished")
    return {name: line[key] for name in METRICS for key in log_keys({name: 1}) if key in line}


@pytest.mark.parametrize("hostile", ["× -1", "× -3", "= 10"])
async def test_one_of_three_values_nodes_does_no_harm(federation: Federation, hostile: str) -> None:
    server, *nodes = start(federation, hostile, paths=3, honest=2)
    assert await all_end(server, *nodes) == [0] * 7, [service.plain for service in (server, *nodes)]
    assert loss(federation) < 0.5
    with federation.ledger() as ledger:
        refused = [[one.node for one in ledger.records(at) if one.verdict is Verdict.AGAINST] for at in range(12)]
        flagged = {node.node: node.flagged for node in run_shown(ledger).nodes if node.flagged}
    if hostile == "= 10":
        assert "evil" in shortened(server)
    else:
        assert refused == [["evil"]] * 12
        assert flagged == {"evil": "against"}
        assert server.said("flagged: against")[0]["node"] == "evil"
    folder = federation.folder / "server"
    assert verify_folder(folder).rounds == 12
    with closing(sqlite3.connect(folder / "ledger.sqlite")) as connection, connection:
        connection.execute("UPDATE updates SET verdict = 4 - verdict WHERE entry = 5 AND blob IS NOT NULL")
    with pytest.raises(RunMismatch, match=r"entry 5: its update of .* is kept as"):
        verify_folder(folder)


async def test_one_that_is_alone_is_compared_with_the_paths(federation: Federation) -> None:
    server, *nodes = start(federation, "× -3", paths=4, honest=0)
    assert await all_end(server, *nodes) == [0] * 6, [service.plain for service in (server, *nodes)]
    with federation.ledger() as ledger:
        verdicts = [one.verdict for at in range(12) for one in ledger.records(at) if one.node == "evil"]
    first = verdicts.index(Verdict.AGAINST)
    assert first <= 3
    assert verdicts[first:] == [Verdict.AGAINST] * (12 - first)
    assert server.said("flagged: against")[0]["node"] == "evil"
    assert loss(federation) < 1
    assert verify_folder(federation.folder / "server").rounds == 12


@pytest.mark.parametrize("honest", [0, 1])
async def test_one_or_two_do_hardly_anything(federation: Federation, honest: int, meerkat: Meerkat) -> None:
    server, *nodes = start(federation, "= 10", paths=4, honest=honest)
    assert await all_end(server, *nodes) == [0] * (6 + honest), [service.plain for service in (server, *nodes)]
    assert "evil" in shortened(server)
    with federation.ledger() as ledger:
        shown = run_shown(ledger)
    assert "evil" in {node.node for node in shown.nodes if node.shortened}
    assert {node.node for node in shown.nodes if node.shortened} <= shortened(server)
    assert {m.SHORTENED: shown.counts[m.SHORTENED]}.items() <= counted(server).items()
    status = meerkat("status", federation.folder / "server").out
    assert f"{m.SHORTENED}: {shown.counts[m.SHORTENED]}" in status
    assert loss(federation) < 1
    assert verify_folder(federation.folder / "server").rounds == 12


async def test_a_trusted_one_that_is_alone_is_not_shortened(federation: Federation) -> None:
    server, *nodes = start(federation, "× 1", paths=3, honest=0, guards={"trusted": ["evil"]})
    assert await all_end(server, *nodes) == [0] * 5, [service.plain for service in (server, *nodes)]
    assert shortened(server) == set()
    with federation.ledger() as ledger:
        assert m.SHORTENED not in run_shown(ledger).counts
    assert loss(federation) < 0.7
    assert verify_folder(federation.folder / "server").rounds == 12
