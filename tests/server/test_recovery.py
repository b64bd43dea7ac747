"""A server that starts on a ledger resumes its run: after a kill, a sleep, a backup, an emptied broker."""

import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.ledger.sqlite import LEDGER_FILE
from meerkat_mq.rounds.records import UpdateRecord
from tests.server.federation import PACE, PATIENCE_S, Federation, Service, all_end
from tests.server.replay import undisturbed, verified
from tests.server.test_kills import ALL, SEEDS, check_the_end, start_nodes
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(200)

ROUNDS = ALL | {"count": 120, "local_steps": 5, "snapshot_every": 20}
LIVELY = PACE | {"min_nodes": 2}  # a node and a ghost


def server(federation: Federation, *flags: str, **settings: Any) -> Service:
    rounds = settings.pop("rounds", ROUNDS)
    return federation.server(*flags, rounds=rounds, **{"toy_weights": 50, **settings})


async def test_the_open_round_goes_on_with_the_updates_already_committed(federation: Federation) -> None:
    rounds = ROUNDS | {"count": 4, "grace_s": 600.0}
    for name in ("node-0", "node-1"):
        federation.node(name, seed=SEEDS[name])
    await federation.ghost(name="node-2")
    first = server(federation, rounds=rounds)
    await first.says("in charge")
    heard: tuple[UpdateRecord, ...] = ()

    def both_are_heard() -> bool:
        nonlocal heard
        with federation.ledger() as ledger:
            heard = ledger.open_updates()
        return len(heard) == 2

    await until(both_are_heard, within_s=PATIENCE_S)
    first.kill()
    second = server(federation, "--once", rounds=rounds)
    await second.says("in charge", term=2, round=0)
    federation.node("node-2", seed=SEEDS["node-2"])
    assert await second.ended() == 0, second.plain
    with federation.ledger() as ledger:
        assert set(heard) < set(ledger.records(0))
        assert verified(ledger) == undisturbed(ledger, SEEDS)


async def test_a_killed_server_goes_on_from_a_snapshot(federation: Federation) -> None:
    nodes = start_nodes(federation)
    first = server(federation)
    await first.says("round closed", round=49)
    first.kill()
    kept = {file.name for file in (federation.folder / "server").glob("*.mks")}
    assert 1 <= len(kept) <= 3  # the third was just written, or just superseded
    second = server(federation, "--once")
    assert (await second.says("in charge", term=2))["round"] >= 50
    await check_the_end(federation, nodes, second)
    with federation.ledger() as ledger:
        assert [snapshot.version for snapshot in ledger.snapshots()] == [120, 100]
    assert {file.name for file in (federation.folder / "server").glob("*.mks")} == {
        "snapshot-120.mks",
        "snapshot-100.mks",
    }
    assert not second.said("snapshot passed over")


@pytest.mark.parametrize("harm", [lambda file: file.write_bytes(b"torn"), Path.unlink])
async def test_a_damaged_snapshot_is_passed_over(federation: Federation, harm: Any) -> None:
    nodes = start_nodes(federation)
    first = server(federation, rounds=ROUNDS | {"count": 60})
    await first.says("model saved")  # after all that was queued, the snapshot too
    first.kill()
    await all_end(*nodes)
    harm(federation.folder / "server" / "snapshot-60.mks")
    second = server(federation, "--once", rounds=ROUNDS | {"count": 60})
    assert await second.ended() == 0
    assert second.said("snapshot passed over")[0]["file"].endswith("snapshot-60.mks")
    assert second.said("run finished")[0]["digest"] == first.said("run finished")[0]["digest"]


async def test_a_finished_run_ends_at_once_and_its_model_stays(federation: Federation) -> None:
    nodes = start_nodes(federation)
    rounds = ROUNDS | {"count": 20}
    assert await server(federation, "--once", rounds=rounds).ended() == 0
    await all_end(*nodes)
    model = (federation.folder / "server" / "difference.mkd").read_bytes()
    again = server(federation, "--once", rounds=rounds)
    assert await again.ended() == 0
    assert again.said("in charge")[0]["round"] == 20
    await until(lambda: (federation.eye.states[-1].term, federation.eye.states[-1].status) == (2, "finished"))
    assert (federation.folder / "server" / "difference.mkd").read_bytes() == model
    stays = server(federation, rounds=rounds)
    await stays.says("run finished")
    late = federation.node("late", exit_when_finished=True)
    assert await late.ended() == 0
    assert late.said("finished")[0]["digest"] == stays.said("run finished")[0]["digest"]


async def test_a_server_that_slept_through_its_replacement_on_one_ledger_is_fenced(federation: Federation) -> None:
    eye = federation.eye
    await federation.ghost()
    federation.node("node-0")
    first = federation.server(name="first", rounds=LIVELY)
    await eye.reaches(3)
    await federation.ghost(name="another")  # nobody waits for the first one any more
    await until(lambda: eye.rounds[-1].heard and eye.rounds[-1].is_open)  # the ledger is at rest until the deadline
    first.signal(signal.SIGSTOP)
    second = federation.server("--replace", name="second", state_dir="first", rounds=LIVELY)
    await second.says("round closed", times=3)
    before = (await eye.follows(2)).run
    first.signal(signal.SIGCONT)
    await first.failed(6, "has taken over")
    await second.says("round closed", times=len(second.said("round closed")) + 3)
    assert {run.run for run in eye.runs} == {before}
    second.stop()
    assert await second.ended() == 0
    with federation.ledger("first") as ledger:
        assert [term.term for term in ledger.terms()] == [1, 2]
        assert verified(ledger)
        version = ledger.version
    assert federation.difference("first").version == version


async def test_a_second_server_on_one_ledger_ends_in_words_unless_it_is_to_replace(federation: Federation) -> None:
    await federation.ghost()
    federation.node("node-0")
    first = federation.server(name="first", rounds=LIVELY)
    await first.says("round closed", times=3)
    second = federation.server(name="second", state_dir="first", rounds=LIVELY)
    await second.failed(6, f"a server on host {socket.gethostname()} says that it is online", "--replace")
    await first.says("round closed", times=len(first.said("round closed")) + 3)
    third = federation.server("--replace", name="third", state_dir="first", rounds=LIVELY)
    await first.failed(6, "has taken over")
    await third.says("round closed", times=3)


def restore(federation: Federation, backup: Path) -> None:
    """As docs/ledger.md says."""
    for pattern in (f"{LEDGER_FILE}*", "snapshot-*.mks", "difference.mkd"):
        for file in (federation.folder / "server").glob(pattern):
            file.unlink()
    shutil.copy(backup, federation.folder / "server" / LEDGER_FILE)


async def backed_up(federation: Federation, lives: int = 2) -> tuple[list[Service], int]:
    """Nodes that stand beyond the ledger, which was put back to a backup so many server lives old; its version."""
    nodes = start_nodes(federation)
    first = server(federation)
    await first.says("round closed", times=10)
    first.stop()
    assert await first.ended() == 0
    backup = federation.folder / "backup"
    shutil.copy(federation.folder / "server" / LEDGER_FILE, backup)
    for _ in range(lives):
        later = server(federation, name="later", state_dir="server")
        await later.says("round closed", times=20)
        later.kill()
    restore(federation, backup)
    with federation.ledger() as ledger:
        return nodes, ledger.version


async def test_a_ledger_restored_from_a_backup_resynchronises_its_nodes_loudly(federation: Federation) -> None:
    nodes, version = await backed_up(federation)
    third = server(federation, "--once")
    assert (await third.says("in charge"))["round"] == version
    assert third.said("in charge")[0]["term"] == 4
    await check_the_end(federation, nodes, third)
    assert all(node.said("resynchronised") for node in nodes)


@pytest.mark.parametrize(("lives", "terms"), [(1, [1, 2, 4]), (2, [1, 2, 4])])
async def test_a_broker_emptied_beside_a_backup_makes_the_server_take_a_term_above_its_nodes(
    federation: Federation, mosquitto: Mosquitto, lives: int, terms: list[int]
) -> None:
    nodes, version = await backed_up(federation, lives)
    mosquitto.kill()
    mosquitto.start()
    third = server(federation, "--once")
    assert (await third.says("in charge"))["round"] == version
    await check_the_end(federation, nodes, third)
    assert all(node.said("resynchronised") for node in nodes)
    with federation.ledger() as ledger:
        assert [term.term for term in ledger.terms()] == terms


async def test_nodes_that_come_back_after_such_a_server_is_in_charge_ask_for_a_term_above_it_too(
    federation: Federation, mosquitto: Mosquitto
) -> None:
    nodes, _ = await backed_up(federation, lives=1)
    for node in nodes:
        node.signal(signal.SIGSTOP)
    mosquitto.kill()
    mosquitto.start()
    third = server(federation, "--once")
    await third.says("in charge", term=2)
    await until(lambda: federation.eye.rounds and not federation.eye.rounds[-1].is_open, within_s=PATIENCE_S)
    for node in nodes:
        node.signal(signal.SIGCONT)
    await check_the_end(federation, nodes, third)
    with federation.ledger() as ledger:
        assert [term.term for term in ledger.terms()] == [1, 2, 4]


FIXED: list[tuple[dict[str, Any], str]] = [
    ({"lr": 0.25}, "rounds.lr: the run was begun with 0.5, the configuration says 0.25"),
    ({"count": 30}, "rounds.count: the run was begun with 20, the configuration says 30"),
    ({"directions": 1}, "rounds.directions: the run was begun with 2"),
    ({"aggregate": "trimmed-mean"}, "rounds.aggregate: the run was begun with 'clipped-mean'"),
    ({"trim": 0.1}, "rounds.trim: the run was begun with 0.2"),
    ({"weigh_by_rows": True}, "rounds.weigh_by_rows: "),
]


async def test_a_ledger_goes_on_under_its_own_rules_only(federation: Federation) -> None:
    nodes = start_nodes(federation)
    rounds = ROUNDS | {"count": 20}
    assert await server(federation, "--once", rounds=rounds).ended() == 0
    await all_end(*nodes)
    path = federation.folder / "server" / LEDGER_FILE
    before = path.read_bytes()
    remedy = "put the old value back, or name another state_dir for a new run"
    for change, words in FIXED:
        await server(federation, rounds=rounds | change).failed(6, f"{path}: {words}", remedy)
    await server(federation, rounds=rounds, toy_weights=60).failed(6, "toy_weights: the run was begun with 50", "60")
    assert path.read_bytes() == before
    may_change = {"quorum": 0.7, "deadline_s": 3.0, "grace_s": 1.0, "min_nodes": 5, "snapshot_every": 7}
    assert await server(federation, "--once", rounds=rounds | may_change, guards={"window": 30}).ended() == 0


async def test_a_ledger_that_cannot_be_written_any_more_ends_the_server_in_words(federation: Federation) -> None:
    nodes = start_nodes(federation)
    full = federation.server(
        rounds=ROUNDS, toy_weights=50, module="tests.server.full_disk", environment={"MEERKAT_DISK": "500000"}
    )
    await full.failed(6, LEDGER_FILE, "start the server again: it goes on where it was")
    seen = federation.eye.version
    with federation.ledger() as ledger:
        assert ledger.version >= seen > 10
        verified(ledger)
    await check_the_end(federation, nodes, server(federation, "--once"))


async def test_what_a_crash_left_beside_the_ledger_is_swept_away(federation: Federation) -> None:
    folder = federation.folder / "server"
    folder.mkdir()
    for name in ("snapshot-7.mks", ".snapshot-8.mks.123"):
        (folder / name).write_bytes(b"left")
    running = server(federation)
    await running.says("in charge")
    assert not list(folder.glob("*snapshot*"))
