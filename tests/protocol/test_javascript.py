"""A node written from `protocol/` alone, in another language, takes part in federations of ours."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from meerkat_mq.core.path import digest, seed_for
from meerkat_mq.core.step import local_steps
from meerkat_mq.engines.toy import QuadraticEngine, toy_mask
from meerkat_mq.rounds.records import Verdict
from tests.node.test_policy import descriptor
from tests.protocol.javascript import JavaScriptNode
from tests.server.federation import TOPICS, Federation, Service, all_end
from tests.server.replay import verified
from tests.server.test_mask_blob import as_begun_elsewhere
from tests.support.waiting import until

Start = Callable[..., JavaScriptNode]

ROUNDS = {"min_nodes": 4, "quorum": 1.0, "deadline_s": 600.0, "batch_size": 2, "eps": 2.0**-10, "lr": 0.5}
TOLERANCE = 1e-3  # a unit in the last place of a loss near 1 is 6e-8, over 2·eps 3e-5

pytestmark = pytest.mark.timeout(240)


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["node", "check.mjs"], cwd=folder, capture_output=True, text=True, check=False)


def test_the_golden_vectors_hold(javascript: Path) -> None:
    done = check(javascript)
    assert done.returncode == 0, done.stdout + done.stderr
    held, of = (int(word) for word in done.stdout.split() if word.isdigit())
    assert held == of > 200


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("directions.json", '"float32": "', '"float32": "00'),
        ("path.json", '"age": 1', '"age": 0'),
        ("frames.json", '"error": "UnknownFlags"', '"error": "BadValue"'),
        ("values.json", '"decoded": "', '"decoded": "00'),
        ("toy.json", '"numbers": [', '"numbers": [9, '),
    ],
)
def test_the_check_notices_a_changed_vector(
    javascript: Path, tmp_path: Path, file: str, before: str, after: str
) -> None:
    shutil.copytree(javascript.parent / "golden", tmp_path / "golden")
    text = (tmp_path / "golden" / file).read_text("utf-8")
    assert before in text
    (tmp_path / "golden" / file).write_text(text.replace(before, after, 1), "utf-8")
    done = subprocess.run(
        ["node", "check.mjs", str(tmp_path / "golden")], cwd=javascript, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout.startswith("WRONG")


def python_nodes(federation: Federation, count: int = 3) -> list[Service]:
    return [federation.node(f"node-{i}", seed=11 + i, exit_when_finished=True) for i in range(count)]


async def check_the_end(federation: Federation, node: JavaScriptNode, *services: Service) -> None:
    """All ended in order, with one digest: that of the ledger's theta."""
    assert await all_end(*services) == [0] * len(services), [service.plain for service in services]
    assert await node.ended() == 0, node.lines
    with federation.ledger() as ledger:
        expected = verified(ledger).hex()
    assert {service.said("finished")[0]["digest"] for service in services if service.said("finished")} == {expected}
    assert node.said("finished")[0]["digest"] == expected
    last = await federation.eye.status("js-1", "stopped")
    assert last.digest == expected
    assert node.plain == []
    assert node.said("message dropped") == node.said("entry refused") == node.said("digest differs") == []


@pytest.mark.parametrize("stream", ["mk1", "rademacher"])
async def test_three_nodes_of_ours_and_one_in_javascript_end_at_one_theta(
    federation: Federation, start_node: Start, stream: str
) -> None:
    walk = {"count": 30, "local_steps": 3, "directions": 2, "perturbations": 2, "stream": stream}
    server, node = federation.server("--once", rounds=ROUNDS | walk), start_node("--exit-when-finished")
    await check_the_end(federation, node, server, *python_nodes(federation))
    with federation.ledger() as ledger:
        records = [record for _, record in ledger.updates(0, 30, "js-1")]
    assert [record.verdict for record in records] == [Verdict.ACCEPTED] * 30


async def test_its_scalars_are_those_of_our_toy_engine(federation: Federation, start_node: Start) -> None:
    walk = {"count": 1, "local_steps": 4, "directions": 2}
    server, node = federation.server("--once", rounds=ROUNDS | walk), start_node("--exit-when-finished")
    await check_the_end(federation, node, server, *python_nodes(federation))
    with federation.ledger() as ledger:
        run = ledger.run
        ((_, record),) = ledger.updates(0, 1, "js-1")
    assert run is not None
    seeds = [seed_for(run.run_id, 0, record.slot % 2, step) for step in range(4)]
    expected, loss = local_steps(
        QuadraticEngine(run.weights), toy_mask(run.weights).theta_0, seeds, [[{"seed": 14}] * 2] * 4,
        stream=run.stream, eps=run.eps, lr=run.lr,
    )  # fmt: skip
    assert record.scalars == pytest.approx(expected, abs=TOLERANCE)
    assert record.loss == pytest.approx(loss, rel=1e-6)


async def test_the_server_is_killed_in_the_middle(federation: Federation, start_node: Start) -> None:
    rounds = ROUNDS | {"count": 60, "local_steps": 3}
    first, node, nodes = federation.server(rounds=rounds), start_node("--exit-when-finished"), python_nodes(federation)
    await federation.eye.reaches(20)
    first.kill()
    assert federation.eye.version < 60
    server = federation.server("--once", rounds=rounds)
    await check_the_end(federation, node, server, *nodes)
    assert node.said("resynchronised") == []


async def test_a_buffered_run_ends_at_one_theta(federation: Federation, start_node: Start) -> None:
    buffered = {"mode": "buffered", "buffer_size": 2, "max_staleness": 3, "count": 60, "local_steps": 3}
    server, node = federation.server("--once", rounds=ROUNDS | buffered), start_node("--exit-when-finished")
    await check_the_end(federation, node, server, *python_nodes(federation))
    with federation.ledger() as ledger:
        entries = ledger.entries(0, 60)
        mine = ledger.updates(0, 60, "js-1")
    assert any(term.age for entry in entries for term in entry.terms)
    assert len(mine) >= 10


@pytest.mark.parametrize("mode", ["synchronous", "buffered"])
async def test_it_follows_what_values_nodes_add(federation: Federation, start_node: Start, mode: str) -> None:
    buffered = {"mode": mode, "buffer_size": 3, "max_staleness": 3} if mode == "buffered" else {}
    rounds = ROUNDS | {"count": 20, "local_steps": 3} | buffered
    server = federation.server("--once", rounds=rounds, values={"accept": True, "codec": "int8"})
    node, path = start_node("--exit-when-finished"), federation.node("node-0", seed=11, exit_when_finished=True)
    values = [
        federation.node(f"node-{codec}", exit_when_finished=True, uplink="values", values={"codec": codec, "lr": 0.05})
        for codec in ("int8", "float32")
    ]
    await check_the_end(federation, node, server, path, *values)
    with federation.ledger() as ledger:
        assert any(entry.displacement for entry in ledger.entries(0, 20))
    assert node.said("blob missed") == []


@pytest.mark.parametrize("snapshots", [False, True])
async def test_a_latecomer_catches_up(federation: Federation, start_node: Start, snapshots: bool) -> None:
    rounds = ROUNDS | {"count": 30, "min_nodes": 3, "local_steps": 20, "snapshot_every": 10 if snapshots else 1000}
    server, nodes = federation.server(rounds=rounds), python_nodes(federation)
    await server.says("run finished")
    node = start_node("--exit-when-finished")
    assert await node.ended() == 0, node.lines
    assert len(node.said("snapshot loaded")) == snapshots
    server.stop()
    await check_the_end(federation, node, server, *nodes)


async def test_sigterm_ends_it_with_its_farewell(federation: Federation, start_node: Start) -> None:
    server, node = federation.server(rounds=ROUNDS | {"count": 5}), start_node()
    await federation.eye.status("js-1", "online")
    node.stop()
    assert await node.ended() == 0
    assert (await federation.eye.status("js-1", "stopped")).version == 0
    server.stop()
    await server.ended()
    assert digest(toy_mask(1000).theta_0).hex() == federation.eye.statuses["js-1"][-1].digest


async def test_it_gets_a_mask_whose_chunks_have_a_name_of_their_own(federation: Federation, start_node: Start) -> None:
    rounds = ROUNDS | {"count": 20}
    first, nodes = federation.server(rounds=rounds), python_nodes(federation)
    await federation.eye.follows(1)
    first.stop()
    assert await first.ended() == 0
    as_begun_elsewhere(federation.folder / "server")
    server, node = federation.server("--once", rounds=rounds), start_node("--exit-when-finished")
    await check_the_end(federation, node, server, *nodes)
    assert federation.eye.runs[-1].mask_blob is not None


async def test_a_mask_too_large_for_it_is_not_fetched_and_the_next_run_is_taken(
    federation: Federation, start_node: Start
) -> None:
    bomb = descriptor(toy_mask(10), weights=2**26, mask_bytes=24_756)
    await federation.eye.session.publish(TOPICS.run, bomb.encode(), retain=True)
    node, eye = start_node(), federation.eye
    said = await node.says("the run is refused")
    await until(lambda: eye.statuses.get("js-1") and eye.statuses["js-1"][-1].refuses == said["problem"])
    assert "js-1" not in eye.wants
    federation.server(rounds={"count": 3, "min_nodes": 1, "min_updates": 1})
    await node.says("finished")
    assert eye.statuses["js-1"][-1].refuses is None
