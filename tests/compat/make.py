"""`python -m tests.compat.make TREE NAME [ROUNDS]`: fixtures/NAME-{synchronous,buffered}.tar.xz, made by TREE's code.

TREE is a working tree of some commit (`git worktree add --detach TREE COMMIT`); this interpreter must have what that
commit needs. ROUNDS, a JSON object, are more settings of `[rounds]`. See README.md for what a fixture holds.
"""

import contextlib
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.compat.processes import PORT, Service, Tap, save_carried, start_again, until
from tests.support.mosquitto import Mosquitto

FIXTURES = Path(__file__).with_name("fixtures")
ROUNDS = {"min_nodes": 2, "quorum": 1.0, "deadline_s": 600.0, "local_steps": 8, "directions": 2, "count": 30,
          "snapshot_every": 3, "lr": 0.05, "batch_size": 4}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "synchronous": ROUNDS,
    "buffered": ROUNDS | {"mode": "buffered", "buffer_size": 2, "max_staleness": 4, "stream": "rademacher",
                          "digest_every": 2},
}  # fmt: skip
FLAGS_ALL = {
    "by": "vpcs",
    "steps": 4,
    "calibration_steps": 12,
    "every": 20,
    "rho_later": 1e-6,
    "rho_quiet": 1.0,
    "require": "either",
}
NODES: dict[str, dict[str, Any]] = {
    "path": {},
    "second": {},
    "values": {"uplink": "values", "values": {"codec": "int8", "lr": 0.05}},  # comes when there are snapshots
}
ENTRIES, REFUSAL, OFFER = 5, 7, 8  # types of frames
FRAME = """
import sys
from meerkat_mq.wire.frames import Header, Update, Want, encode
header = Header.of(bytes.fromhex({run!r}), {term}, version := {version}, bytes.fromhex({mask!r}))
boot = {boot}
sys.stdout.buffer.write(encode({frame}))
"""


def toml(table: Mapping[str, Any]) -> str:
    """A table as TOML."""
    plain = [f"{key} = {json.dumps(value)}\n" for key, value in table.items() if not isinstance(value, Mapping)]
    sections = [f"\n[{key}]\n{toml(value)}" for key, value in table.items() if isinstance(value, Mapping)]
    return "".join(plain + sections)


class Scene:
    """One federation of an older release; `folder` becomes the fixture."""

    def __init__(self, folder: Path, tree: Path, mode: str, rounds: dict[str, Any], tap: Tap) -> None:
        self.folder, self.tap, self.mode = folder, tap, mode
        self._tree = tree
        self._gates = folder.with_name("gates")
        folder.mkdir()
        self._gates.mkdir()
        self.services: dict[str, Service] = {}
        self._write_settings(MODES[mode] | rounds)

    def _write_settings(self, rounds: Mapping[str, Any]) -> None:
        common = {"federation": "f", "broker": {"url": f"mqtt://127.0.0.1:{PORT}"}}
        tables: dict[str, dict[str, Any]] = {
            "server": {"engine": "toy", "toy_weights": 64, "rounds": rounds, "early_stopping": FLAGS_ALL,
                       "values": {"accept": True}}
        }  # fmt: skip
        for number, (node, settings) in enumerate(NODES.items()):
            (self.folder / f"{node}.jsonl").write_text("".join(f'{{"seed": {7 * number + r}}}\n' for r in range(8)))
            tables[node] = {"id": node, "data": f"{node}.jsonl", "exit_when_finished": True, **settings}
        for name, table in tables.items():
            (self.folder / f"{name}.toml").write_text(toml({"state_dir": name, **common, **table}))

    def start(self, name: str, *, more: str = "") -> None:
        """Start the server or a node on the folder's files."""
        config = self.folder / f"{name}-running.toml"
        config.write_text((self.folder / f"{name}.toml").read_text().replace(PORT, str(self.tap.port)) + more)
        kind = "server" if name == "server" else "node"
        self.services[name] = Service(kind, config, tree=self._tree)

    def start_node(self, name: str, *, sleepy: bool = False) -> None:
        """Start a node that steps only while its gate is open."""
        self.open(name)
        allow = json.dumps(["test", "-e", str(self._gates / name)])
        schedule = "[schedule]\nevery_s = 1\n" if sleepy else ""
        self.start(name, more=f"\n{schedule}[limits]\nallow = {allow}\ncheck_s = 0.05\n")

    def open(self, node: str) -> None:
        """Let a node make local steps."""
        (self._gates / node).touch()

    def close(self, node: str) -> None:
        """Let it make none."""
        (self._gates / node).unlink()

    def held_up(self, node: str) -> None:
        """Wait until a node has found its gate closed."""
        service = self.services[node]
        until(lambda: service.said.rpartition("local steps ")[2].startswith("not allowed"), f"{node} is held up")

    def ledger(self, what: str) -> int:
        """A number out of the ledger: what comes after SELECT."""
        path = f"file:{self.folder}/server/ledger.sqlite?mode=ro"
        with contextlib.closing(sqlite3.connect(path, uri=True)) as connection:
            return int(connection.execute(f"SELECT {what}").fetchone()[0])

    def waiting(self) -> int:
        """How many committed updates are in no entry."""
        return self.ledger("count(*) FROM updates WHERE entry IS NULL")

    def say(self, topic: str, frame: str) -> None:
        """Publish a frame, made by the release's own code, as the node "path" would."""
        run, state, node = (json.loads(self.tap.payloads(topic)[-1]) for topic in ("run", "server", "up/path/status"))
        code = FRAME.format(frame=frame, run=run["run"], mask=run["mask"], term=state["term"],
                            version=self.ledger("count(*) FROM entries"), boot=node["boot"])  # fmt: skip
        made = subprocess.run(
            [sys.executable, "-P", "-c", code], env={"PYTHONPATH": str(self._tree)}, check=True, capture_output=True
        )
        self.tap.publish(f"meerkat/v1/f/{topic}", made.stdout)

    def replied(self, kind: int) -> int:
        """How many of the server's replies are frames of this type."""
        return sum(frame[3] == kind for frame in self.tap.payloads("reply"))

    def kill(self) -> None:
        """SIGKILL to all of them."""
        for service in self.services.values():
            service.kill()


def play(scene: Scene) -> None:
    """Two terms of a server; it is killed with an open round, while a node has an update that it did not get."""
    scene.start("server")
    scene.start_node("path")
    scene.start_node("second", sleepy=scene.mode == "synchronous")  # else it would keep no update
    scene.tap.reaches(13)
    scene.close("path")
    scene.close("second")
    scene.services["server"].signal(signal.SIGTERM)  # so there is a difference.mkd
    assert scene.services["server"].ended() == 0, scene.services["server"].said
    scene.start("server")
    scene.start_node("values")
    until(lambda: scene.replied(OFFER), "an offer")
    scene.open("path")
    scene.open("second")
    until(lambda: scene.tap.payloads("values/update"), "the values node takes part")
    scene.tap.reaches(scene.tap.version + 2)
    until(
        lambda: scene.mode == "synchronous" or scene.ledger("count(*) FROM updates WHERE entry > version"),
        "a stale update is in an entry",
    )
    held = ("path",) if scene.mode == "synchronous" else ("path", "values")
    for node in held:
        scene.close(node)
    for node in held:
        scene.held_up(node)
    until(scene.waiting, "a round that waits")
    offers = scene.replied(OFFER)
    scene.say("up/path/want", "Want(header, boot, entries_from=version - 1)")
    until(lambda: scene.replied(ENTRIES) or scene.replied(OFFER) > offers, "an answer")
    if not scene.replied(ENTRIES):  # the run went on meanwhile, and a snapshot was cheaper
        scene.say("up/path/want", "Want(header, boot, entries_from=version - 1)")
        until(lambda: scene.replied(ENTRIES), "entries")
    scene.say("up/path/update", "Update(header, boot, bytes(8), 1.0, (1.0,) * 8)")
    until(lambda: scene.replied(REFUSAL), "a refusal")
    if scene.mode == "synchronous":
        scene.close("second")
        scene.open("path")
        scene.held_up("second")
        kill_before_it_hears(scene, "second", waiting=2)
    else:
        kill_before_it_hears(scene, "values", waiting=1)


def kill_before_it_hears(scene: Scene, node: str, *, waiting: int) -> None:
    """Freeze the server once so many updates, or more, wait, and kill all once the node has kept its own."""
    kept = scene.folder / node / "update"
    until(lambda: scene.waiting() >= waiting and not kept.exists(), f"{waiting} updates wait")
    scene.services["server"].signal(signal.SIGSTOP)
    scene.open(node)
    until(kept.exists, f"{node} keeps its update")
    scene.kill()
    assert scene.waiting() >= waiting


def finish(folder: Path, tree: Path, broker: Mosquitto) -> str:
    """Let the release's own code finish the run; the digest of its theta."""
    services = [start_again(folder, name, broker.port, tree=tree) for name in ("server", *NODES)]
    assert [service.ended() for service in services] == [0] * len(services), [service.said for service in services]
    finished = [json.loads(line) for line in services[0].said.splitlines() if '"run finished"' in line]
    return str(finished[0]["digest"])


def make(tree: Path, name: str, mode: str, rounds: dict[str, Any], work: Path) -> None:
    """Make one fixture."""
    work.mkdir()
    broker = Mosquitto(work)
    folder = work / "fixture"
    try:
        broker.start()
        with Tap(broker.port) as tap:
            scene = Scene(folder, tree, mode, rounds, tap)
            try:
                play(scene)
            finally:
                scene.kill()
            for left in folder.glob("*-running.*"):
                left.rename(work / left.name)
            settings = folder / "server.toml"  # whoever finishes the run waits for all nodes: so all find one theta
            settings.write_text(settings.read_text().replace("min_nodes = 2", "min_nodes = 3"))
            shutil.copytree(folder, work / "copy")
            commit = subprocess.run(
                ["git", "-C", tree, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
            )
            digest = finish(work / "copy", tree, broker)
            said = {"commit": commit.stdout.strip(), "mode": mode, "digest": digest}
            (folder / "about.json").write_text(json.dumps(said, indent=1) + "\n")
            save_carried(folder / "carried.jsonl", tap.carried)
    finally:
        broker.kill()
    with tarfile.open(FIXTURES / f"{name}-{mode}.tar.xz", "w:xz") as tar:
        tar.add(folder, ".")


if __name__ == "__main__":
    tree, name, *more = sys.argv[1:]
    with tempfile.TemporaryDirectory() as temporary:
        for mode in MODES:
            make(Path(tree).resolve(), name, mode, json.loads(more[0]) if more else {}, Path(temporary) / mode)
