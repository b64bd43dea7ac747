"""The server is killed, anywhere: the run goes on from what was committed, and ends where it would have ended."""

import asyncio
import os
import random
import signal
from typing import Any

import pytest

from meerkat_mq.rounds.records import Verdict
from tests.server.federation import Federation, Service, all_end
from tests.server.replay import undisturbed, verified

KILLS = int(os.environ.get("MEERKAT_KILLS", "6"))
LIFE_S = 1.0
SEEDS = {f"node-{i}": 11 + i for i in range(3)}
ALL = {"min_nodes": 3, "quorum": 1.0, "deadline_s": 600.0, "batch_size": 1, "eps": 2.0**-10, "lr": 0.5, "directions": 2}
WALK = {"local_steps": 10, "snapshot_every": 20}

pytestmark = pytest.mark.timeout(120 + 6 * KILLS)


def start_nodes(federation: Federation) -> list[Service]:
    return [federation.node(node, seed=seed, exit_when_finished=True) for node, seed in SEEDS.items()]


async def check_the_end(federation: Federation, nodes: list[Service], server: Service) -> None:
    """All came to the same end, and that is where an undisturbed run would have come."""
    assert await all_end(server, *nodes) == [0] * 4, [service.plain for service in (server, *nodes)]
    with federation.ledger() as ledger:
        expected = undisturbed(ledger, SEEDS)
        closed = [[record.verdict for record in ledger.records(version)] for version in range(ledger.version)]
        assert closed == [[Verdict.ACCEPTED] * 3] * len(closed)
        assert verified(ledger) == expected
        assert [row.term for row in ledger.terms()] == sorted({row.term for row in ledger.terms()})
    assert server.said("run finished")[0]["digest"] == expected.hex()
    assert {node.said("finished")[0]["digest"] for node in nodes} == {expected.hex()}


async def killed(federation: Federation, rng: random.Random, **settings: object) -> None:
    """Start the server, and kill it at some moment of its start or, more often, its rounds."""
    server = federation.server(**settings)  # type: ignore[arg-type]
    if rng.random() < 0.8:
        await server.says("in charge")
    await asyncio.sleep(rng.uniform(0.0, LIFE_S))  # the moment is the point
    assert not server.over or await server.ended() == 0, server.plain
    server.kill()


async def test_killed_at_random_moments_the_run_ends_where_an_undisturbed_one_does(federation: Federation) -> None:
    rng, rounds = random.Random(KILLS), dict[str, Any](ALL | WALK, count=40 * (KILLS + 1))
    nodes = start_nodes(federation)
    versions = []
    for _ in range(KILLS):
        await killed(federation, rng, rounds=rounds, toy_weights=500)
        versions.append(federation.eye.version)
    print(f"\nkilled {KILLS} times, at rounds {versions} of {rounds['count']}")  # noqa: T201
    last, left = federation.server("--once", rounds=rounds, toy_weights=500), rounds["count"] - federation.eye.version
    await last.ended(within_s=60 + 0.1 * left)  # a busy machine makes few rounds between two kills
    await check_the_end(federation, nodes, last)


async def test_killed_under_deadlines_the_ledger_verifies_each_time(federation: Federation) -> None:
    rng, rounds = (
        random.Random(7 + KILLS),
        WALK | {"count": 1_000_000, "min_nodes": 3, "deadline_s": 0.05, "eps": 2.0**-10},
    )
    await federation.ghost()
    for node in ("node-0", "node-1"):
        federation.node(node)
    before = 0
    for _ in range(KILLS):
        await killed(federation, rng, rounds=rounds)
        if (federation.folder / "server" / "ledger.sqlite").exists():
            with federation.ledger() as ledger:
                assert ledger.version >= before
                before = ledger.version
                assert ledger.run is None or verified(ledger)
    server = federation.server(rounds=rounds)
    await server.says("round closed", times=2)
    server.stop()
    assert await server.ended() == 0
    with federation.ledger() as ledger:
        assert verified(ledger)
        assert ledger.version > before


LIVES = [
    "make before 1", "make after 1", "begin before 1", "begin after 1", "term before 1", "term after 1",
    "slot before 1", "slot after 1", "updates before 1", "updates after 1", "entry before 1", "entry after 2",
    "group before 7", "group after 7", "snapshot file before 1", "snapshot file after 1", "snapshot row before 1",
    "snapshot row after 1", "group after 33", "snapshot row after 3", "sightings before 1", "sightings after 1",
    "difference before 1", "difference after 1",
]  # fmt: skip


async def test_killed_at_each_write_the_run_ends_where_an_undisturbed_one_does(federation: Federation) -> None:
    rounds = ALL | {"local_steps": 4, "snapshot_every": 7, "count": 250}
    nodes = start_nodes(federation)
    for life in LIVES:
        server = federation.server(
            "--once", rounds=rounds, toy_weights=50, module="tests.server.killed", environment={"MEERKAT_KILL": life}
        )
        assert await server.ended() == -signal.SIGKILL, (life, server.plain)
    await check_the_end(federation, nodes, federation.server("--once", rounds=rounds, toy_weights=50))
