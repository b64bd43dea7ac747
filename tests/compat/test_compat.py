"""What older releases left, in fixtures/ (README.md), today's processes and commands go on with."""

import json
import shutil
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.wire.descriptor import NodeStatus, RunDescriptor, ServerState, decode_control
from meerkat_mq.wire.frames import Update, decode, encode
from tests.compat.processes import Service, Tap, load_carried, start_again
from tests.support.command import Meerkat
from tests.support.mosquitto import Mosquitto

pytestmark = pytest.mark.timeout(150)

FIXTURES = sorted(Path(__file__).with_name("fixtures").glob("*.tar.xz"))
NODES = ("path", "second", "values")
UNHEARD = {"synchronous": "second", "buffered": "values"}  # the node whose kept update the server did not get
HEADER, CHECKSUM = 24, 4  # bytes of a frame
BEFORE_FRAME = 28  # bytes of the file of a kept update
ENTRIES = "SELECT entry FROM entries ORDER BY version"
CONTROL: dict[str, Any] = {"run": RunDescriptor, "server": ServerState, "status": NodeStatus}


@pytest.fixture(params=FIXTURES, ids=[file.name.removesuffix(".tar.xz") for file in FIXTURES])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a federation whose processes were killed."""
    with tarfile.open(request.param) as tar:
        tar.extractall(tmp_path / "federation", filter="data")
    return tmp_path / "federation"


def rows(folder: Path, query: str, *values: object) -> list[tuple[Any, ...]]:
    """What a query finds in the server's ledger."""
    with closing(sqlite3.connect(folder / "server" / "ledger.sqlite")) as connection:
        return connection.execute(query, values).fetchall()


def digest_of(service: Service) -> str:
    """theta's, as the server or a node logged it at the end."""
    lines = [json.loads(line) for line in service.said.splitlines() if line.startswith("{")]
    (digest,) = (line["digest"] for line in lines if line["event"] in ("run finished", "finished"))
    return str(digest)


def finish(folder: Path, port: int) -> set[str]:
    """Let today's processes finish the run; the digests that they end with."""
    services = [start_again(folder, name, port) for name in ("server", *NODES)]
    try:
        assert [service.ended() for service in services] == [0] * 4, [service.said for service in services]
    finally:
        for service in services:
            service.kill()
    return {digest_of(service) for service in services}


def test_the_ledger_verifies_as_it_was_left(folder: Path, meerkat: Meerkat) -> None:
    verified = meerkat("verify", folder / "server")
    assert verified.code == 0, verified
    assert "snapshot" in verified.out


def test_todays_processes_finish_the_run(folder: Path, mosquitto: Mosquitto, meerkat: Meerkat) -> None:
    about = json.loads((folder / "about.json").read_text())
    shutil.copytree(folder, before := folder.with_name("before"))
    node = UNHEARD[about["mode"]]
    kept = kept_frame(folder / node / "update")
    with Tap(mosquitto.port) as tap:
        (digest,) = finish(folder, mosquitto.port)
    (was,) = {sent.payload for sent in load_carried(folder / "carried.jsonl") if sent.topic.endswith("/run")}
    for run in tap.payloads("run"):  # nodes of that release refuse a key that they do not know
        assert json.loads(run).keys() == json.loads(was).keys()
    entries = rows(before, ENTRIES)
    assert rows(folder, ENTRIES)[: len(entries)] == entries
    verified = meerkat("verify", folder / "server")
    assert verified.code == 0, verified
    assert digest in verified.out
    if about["mode"] == "synchronous":  # every node is in every round: both releases come to one theta
        assert digest == about["digest"]
    check_taken(folder, node, kept, tap.payloads(f"up/{node}/update"))


def kept_frame(file: Path) -> bytes:
    """The frame of the update that a node has kept: after magic, run id and the frame's length."""
    data = file.read_bytes()
    return data[BEFORE_FRAME : BEFORE_FRAME + int.from_bytes(data[BEFORE_FRAME - 4 : BEFORE_FRAME], "little")]


def check_taken(folder: Path, node: str, kept: bytes, sent: list[bytes]) -> None:
    """The update that an earlier process had kept, was sent as it was, and is in the ledger."""
    assert kept[HEADER:-CHECKSUM] in {frame[HEADER:-CHECKSUM] for frame in sent}  # the header names another term
    update = decode(kept)
    assert isinstance(update, Update)
    query = "SELECT updates.boot, entry FROM updates JOIN nodes USING (slot) WHERE node = ? AND version = ?"
    ((boot, entry),) = rows(folder, query, node, update.header.version)
    assert boot == update.boot
    assert entry is not None


def test_all_that_the_broker_carried_is_read_as_it_was_meant(folder: Path) -> None:
    kinds = set[str]()
    for message in load_carried(folder / "carried.jsonl"):
        kind = message.topic.rpartition("/")[2]
        if kind in CONTROL:
            decode_control(message.payload, CONTROL[kind])
        else:
            frame = decode(message.payload)
            assert encode(frame) == message.payload
            kind = type(frame).__name__
        kinds.add(kind)
    frames = {"Update", "Round", "Want", "Welcome", "Entries", "Chunk", "Refusal", "Offer"}
    assert kinds == frames | set(CONTROL)
