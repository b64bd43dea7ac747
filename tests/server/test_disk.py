"""Disks that are full for a while: nobody ends, nothing is said that is not kept, and all go on by themselves."""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from tests.server.federation import Federation, all_end
from tests.server.replay import verified
from tests.support.waiting import until

ROUNDS = {"count": 1_000_000, "snapshot_every": 20}


@dataclass
class Disk:
    """A small file system of its own, in memory."""

    folder: Path

    def fill(self) -> None:
        with (self.folder / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    def free(self) -> None:
        (self.folder / "filler").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Disk]]:
    """Make a disk of 8 MiB in a new folder of this name."""
    made: list[Path] = []

    def make(name: str) -> Disk:
        folder = tmp_path / name
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
        try:
            done = subprocess.run(mount, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"no mount: {error}")
        if done.returncode != 0:
            pytest.skip(f"this user may mount no file system: {done.stderr.strip()}")
        made.append(folder)
        return Disk(folder)

    yield make
    for folder in made:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def test_a_server_whose_disk_is_full_waits_for_it(federation: Federation, disk: Callable[[str], Disk]) -> None:
    full = disk("server")
    server = federation.server(rounds=ROUNDS, toy_weights=50)
    nodes = [federation.node(name) for name in ("a", "b", "c")]
    await federation.eye.reaches(30)
    full.fill()
    assert "no space left" in (await server.says("ledger not available, trying again"))["problem"]
    with federation.ledger() as ledger:
        stood = ledger.version
    assert federation.eye.version <= stood  # nobody was told of what is not kept
    full.free()
    await server.says("ledger available again")
    await federation.eye.reaches(stood + 30)
    assert not any(process.over for process in (server, *nodes))
    assert len({state.term for state in federation.eye.states}) == 1
    server.stop()
    assert await server.ended() == 0
    with federation.ledger() as ledger:
        verified(ledger)


@pytest.mark.parametrize("removed", [False, True])
async def test_a_server_whose_ledger_is_taken_away_commits_nothing(
    federation: Federation, tmp_path: Path, removed: bool
) -> None:
    """Of a file that was removed while it is open, SQLite takes every commit, and all are lost at the end."""
    server = federation.server(rounds=ROUNDS, toy_weights=50)
    nodes = [federation.node(name) for name in ("a", "b", "c")]
    await federation.eye.reaches(10)
    folder, aside = tmp_path / "server", tmp_path / "aside"
    folder.rename(aside)
    if removed:
        (aside / LEDGER_FILE).unlink()
    assert "was removed, moved" in (await server.says("ledger not available, trying again"))["problem"]
    if not removed:
        stood = federation.eye.version
        aside.rename(folder)
        await server.says("ledger available again")
        await federation.eye.reaches(stood + 10)
    for service in (server, *nodes):
        service.stop()
    assert await all_end(server, *nodes) == [0] * 4
    if not removed:
        with federation.ledger() as ledger:
            verified(ledger)


async def test_a_server_may_be_started_while_its_disk_is_full(
    federation: Federation, disk: Callable[[str], Disk]
) -> None:
    full = disk("server")
    first = federation.server(rounds=ROUNDS, toy_weights=50)
    nodes = [federation.node(name) for name in ("a", "b", "c")]
    await federation.eye.reaches(10)
    first.kill()
    full.fill()
    second = federation.server("--replace", rounds=ROUNDS, toy_weights=50)
    await second.says("ledger not available, trying again")
    full.free()
    await second.says("in charge")
    await federation.eye.reaches(federation.eye.version + 10)
    assert not any(process.over for process in (second, *nodes))


async def test_a_node_whose_disk_is_full_goes_on(federation: Federation, disk: Callable[[str], Disk]) -> None:
    full = disk("a")
    server = federation.server(rounds=ROUNDS, toy_weights=50)
    nodes = [federation.node(name) for name in ("a", "b", "c")]
    await nodes[0].says("ready")
    full.fill()
    await nodes[0].says("not written, trying again later")
    stood = federation.eye.version
    await federation.eye.reaches(stood + 30)
    full.free()
    await nodes[0].says("written again", file="step counter")
    assert not any(process.over for process in (server, *nodes))
    server.stop()
    await server.ended()
    ledger = Ledger.read(federation.folder / "server" / LEDGER_FILE)
    late = {record.node for version in range(stood + 5, stood + 30) for record in ledger.records(version)}
    ledger.close()
    assert "a" in late


async def test_the_model_of_a_finished_run_is_saved_once_the_disk_takes_it(federation: Federation) -> None:
    folder = federation.folder / "server"
    (folder / "difference.mkd").mkdir(parents=True)  # what cannot be replaced by a file
    server = federation.server("--once", rounds={"count": 20}, toy_weights=50)
    nodes = [federation.node(name, exit_when_finished=True) for name in ("a", "b", "c")]
    await server.says("not written, trying again later", file="difference.mkd")
    assert [await node.ended() for node in nodes] == [0, 0, 0]
    (folder / "difference.mkd").rmdir()
    assert await server.ended() == 0, server.plain
    await until((folder / "difference.mkd").is_file)
