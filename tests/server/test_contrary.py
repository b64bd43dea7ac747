"""H9, H10, H18 and H22 on a real broker: two nodes of eight that work against the run, and what they leave behind.

The hostile nodes compute as nodes do, and send something else. The toy engine's rows pull theta to the mean of the
nodes' points: how far theta has come is what the run has learnt.
"""

import asyncio
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.path import digest, seeds_of
from meerkat_mq.core.replica import Replica
from meerkat_mq.core.step import local_steps
from meerkat_mq.engines.toy import QuadraticEngine, toy_mask
from meerkat_mq.errors import RunMismatch
from meerkat_mq.ledger.folder import verify_folder
from meerkat_mq.observe.page import write_report
from meerkat_mq.server.reporting import read_report
from meerkat_mq.wire.descriptor import NodeStatus
from meerkat_mq.wire.frames import encode
from meerkat_mq.wire.messages import Header, Update
from tests.server.federation import TOPICS, Federation, Service
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(300)

HONEST, HOSTILE = 6, ("evil-0", "evil-1")
ROUNDS, LR, WEIGHTS, EPS = 60, 0.4, 10, 2.0**-10
SEEDS = (7, 8)  # of everybody's rows, in batches of four of eight
NAME = "<script>alert(1)</script>\x1b[2J"  # of a host

Bend = Callable[[random.Random, float], float]


def pushes_back(_: random.Random, scalar: float) -> float:
    """H9."""
    return -3.0 * scalar


def is_noise(chance: random.Random, scalar: float) -> float:
    """H10: five times the size."""
    return 5.0 * abs(scalar) * chance.choice((-1.0, 1.0))


async def work_against(federation: Federation, name: str, bend: Bend) -> None:
    """Take part as a node, but bend each projected gradient."""
    eye, chance, mask, engine = federation.eye, random.Random(name), toy_mask(WEIGHTS), QuadraticEngine(WEIGHTS)
    run, rows = eye.runs[-1], [{"seed": seed} for seed in SEEDS]
    replica = Replica(mask, run_id=run.run_id, stream="mk1", digest_every=1)
    while replica.version < ROUNDS:
        seeds = seeds_of(run.run_id, replica.version, 0, 1)
        scalars, loss = local_steps(engine, replica.theta, seeds, [rows], stream="mk1", eps=run.eps, lr=run.lr)
        header = Header.of(run.run_id, eye.rounds[-1].header.term, replica.version, run.mask_hash)
        bent = float(np.float32(bend(chance, scalars[0])))
        base = digest(replica.theta)[:8]
        eye.session.publish(TOPICS.up(name, "update"), encode(Update(header, 1, base, loss, (bent,))))
        wanted = replica.version

        def entry(wanted: int = wanted) -> list[object]:
            return [e for frame in eye.rounds[-9:] for e in frame.entries if e.version == wanted]

        await until(entry, within_s=60.0)
        replica.apply(entry()[0].terms)  # type: ignore[attr-defined]


async def learnt(federation: Federation, bend: Bend | None) -> tuple[float, Service]:
    """How much of the way to the mean of the rows' points theta has come, 1 for all of it; and the server."""
    rules = {"count": ROUNDS, "min_nodes": HONEST, "quorum": 1.0, "lr": LR, "eps": EPS, "directions": 1}
    server = federation.server(rounds=rules | {"deadline_s": 30.0}, toy_weights=WEIGHTS)
    await federation.eye.follows(1)
    hostile = HOSTILE if bend is not None else ()
    for name in hostile:
        said = NodeStatus(status="online", boot=1, link=1, host=NAME, version=ROUNDS)
        federation.eye.ghosts[TOPICS.up(name, "status")] = said.encode()
        await federation.eye.session.publish(TOPICS.up(name, "status"), said.encode(), retain=True)
    (federation.folder / "rows.jsonl").write_text("".join(f'{{"seed": {seed}}}\n' for seed in SEEDS * 4))
    names = [f"node-{number}" for number in range(HONEST)]
    nodes = [federation.node(name, data="rows.jsonl", exit_when_finished=True) for name in names]
    await until(lambda: federation.eye.rounds and federation.eye.rounds[-1].is_open, within_s=60.0)
    if bend is not None:
        await asyncio.gather(*(work_against(federation, name, bend) for name in hostile))
    for node in nodes:
        assert await node.ended() == 0, node.plain
    server.stop()
    assert await server.ended() == 0
    goal: Float32Array = np.mean([direction("mk1", seed, 0, WEIGHTS) for seed in SEEDS], axis=0)
    left = federation.difference().theta - goal
    return 1.0 - float(left @ left / (goal @ goal)), server


@pytest.mark.parametrize("bend", [pushes_back, is_noise])
async def test_two_of_eight_that_work_against_the_run(federation: Federation, tmp_path: Path, bend: Bend) -> None:
    """The plain mean of six honest numbers and of two that are −3 times as large is nothing; nobody else is flagged."""
    progress, server = await learnt(federation, bend)
    folder = federation.folder / "server"
    with federation.ledger() as ledger:
        by_evil = [one.node in HOSTILE for version in range(ROUNDS) for one in ledger.records(version)]
    assert sum(by_evil) > ROUNDS
    assert progress > 0.9
    flags = [line for why in ("against", "outlier") for line in server.said(f"flagged: {why}")]
    assert flags or bend is is_noise  # noise is clipped; whether it is noticed is a matter of chance (docs/guards.md)
    assert {line["node"] for line in flags} <= set(HOSTILE)
    assert verify_folder(folder).rounds == ROUNDS
    # H22: what a node says of itself is text
    write_report(tmp_path / "report.html", read_report(folder))
    assert "<script>alert" not in (tmp_path / "report.html").read_text()
    assert all(line.isprintable() for line in server.config.with_suffix(".log").read_text().splitlines())
    # H18: the contributor of an entry is altered
    with closing(sqlite3.connect(folder / "ledger.sqlite")) as connection, connection:
        connection.execute("UPDATE nodes SET node = 'somebody' WHERE node = 'node-0'")
    with pytest.raises(RunMismatch):
        verify_folder(folder)
