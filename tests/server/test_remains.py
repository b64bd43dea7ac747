"""A ledger that lost its newest part is never taken for a new run, nor for the whole of an old one."""

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from meerkat_mq.errors import LedgerError
from meerkat_mq.ledger.files import check_remains, mask_file, snapshot_file
from meerkat_mq.ledger.folder import verify_folder
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.wire.descriptor import ServerState
from meerkat_mq.wire.snapshot import Difference, encode_snapshot
from tests.ledger.ledgers import RUN, Writer
from tests.server.federation import PACE, Federation

pytestmark = pytest.mark.timeout(150)

OTHER = bytes(reversed(RUN))


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    made = Writer(tmp_path / "server")
    for _ in range(3):
        made.round()
    return made


def snapshot(writer: Writer, version: int, run: bytes = RUN) -> Path:
    file = snapshot_file(writer.folder, version)
    file.write_bytes(encode_snapshot(run, version, bytes(16), np.zeros(writer.mask.size, dtype=np.float32)))
    return file


def difference(writer: Writer, version: int, run: bytes = RUN) -> Path:
    file = writer.folder / "difference.mkd"
    Difference(writer.mask, writer.mask.theta_0, run, version).save(file)
    return file


def mask_copy(writer: Writer) -> Path:
    file = mask_file(writer.folder, writer.mask.hash)
    writer.mask.save(file)
    return file


def lost_wal(writer: Writer) -> Path:
    file = writer.folder / f"{LEDGER_FILE}-wal"
    file.write_bytes(b"")
    return file


def emptied(path: Path) -> None:
    """A ledger that no run was begun in."""
    missing(path)
    made = path.parent / "made" / LEDGER_FILE
    made.parent.mkdir()
    Ledger.open(made).close()
    made.rename(path)


def missing(path: Path) -> None:
    for file in path.parent.glob(f"{LEDGER_FILE}*"):
        file.unlink()


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but those that SQLite makes to read."""
    files = [file for file in folder.iterdir() if file.suffix not in (".sqlite-wal", ".sqlite-shm")]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


REMAINS: list[Callable[[Writer], Path]] = [lambda w: snapshot(w, 500), lambda w: difference(w, 3), mask_copy]


@pytest.mark.parametrize("leave", REMAINS)
@pytest.mark.parametrize(("lose", "words"), [(emptied, "holds no run"), (missing, "is missing")])
def test_an_empty_ledger_beside_what_a_run_left_is_no_new_run(
    writer: Writer, lose: Callable[[Path], None], words: str, leave: Callable[[Writer], Path]
) -> None:
    writer.ledger.close()
    path = writer.folder / LEDGER_FILE
    lose(path)
    file = leave(writer)
    before = contents(writer.folder)
    with pytest.raises(LedgerError, match=f"{words}, but {file.name} beside it .*put back the whole ledger") as caught:
        check_remains(path, None, 0)
    assert "name another state_dir" in caught.value.remedy
    with pytest.raises(LedgerError, match=f"{file.name} beside it"):
        verify_folder(writer.folder)
    assert contents(writer.folder) == before


def test_what_sqlite_kept_of_a_ledger_that_is_gone_is_not_read_into_a_new_one(writer: Writer) -> None:
    writer.ledger.close()
    path = writer.folder / LEDGER_FILE
    missing(path)
    lost_wal(writer)
    with pytest.raises(LedgerError, match=r"is missing, but ledger\.sqlite-wal beside it is of one"):
        Ledger.open(path)
    assert not path.exists()


@pytest.mark.parametrize("make", [snapshot, difference])
def test_a_ledger_that_is_older_than_what_lies_beside_it_is_refused(writer: Writer, make: Callable[..., Path]) -> None:
    path, version = writer.folder / LEDGER_FILE, writer.ledger.version
    file = make(writer, version)
    check_remains(path, writer.run, version)
    make(writer, version, OTHER)
    words = rf"is of run {RUN.hex()[:8]}, but {file.name} beside it is of run {OTHER.hex()[:8]}; .*or move"
    with pytest.raises(LedgerError, match=words):
        check_remains(path, writer.run, version)
    file.unlink()
    newer = make(writer, version + 1)
    words = rf"ends at version {version}, but {newer.name} beside it is of version {version + 1}; .*move {newer.name}"
    with pytest.raises(LedgerError, match=words):
        check_remains(path, writer.run, version)


def test_torn_files_tell_nothing_of_a_run(tmp_path: Path) -> None:
    for name in ("snapshot-7.mks", "difference.mkd"):
        (tmp_path / name).write_bytes(b"torn")
    check_remains(tmp_path / LEDGER_FILE, None, 0)


async def test_a_copy_of_the_main_file_alone_has_the_run_from_its_first_term_on(federation: Federation) -> None:
    running = federation.server(rounds=PACE)
    await running.says("in charge")
    copy = federation.folder / "copy" / LEDGER_FILE
    copy.parent.mkdir()
    shutil.copy(federation.folder / "server" / LEDGER_FILE, copy)
    with federation.ledger() as ledger, closing(Ledger.open(copy)) as copied:
        assert copied.run is not None
        assert copied.run == ledger.run
        assert copied.terms() == ledger.terms()


async def test_an_emptied_ledger_ends_its_server_before_it_says_anything(federation: Federation) -> None:
    first = federation.server(rounds=PACE | {"count": 1, "snapshot_every": 1}, once=True)
    federation.node("node-0")
    federation.node("node-1")
    await federation.eye.follows(1)
    assert await first.ended() == 0
    runs, path = len(federation.eye.runs), federation.folder / "server" / LEDGER_FILE
    emptied(path)
    again = federation.server(rounds=PACE)
    await again.failed(6, f"{path}: holds no run, but snapshot-1.mks beside it is of one", "put back the whole ledger")
    missing(path)
    await federation.server(rounds=PACE).failed(6, f"{path}: is missing, but snapshot-1.mks")
    assert not path.exists()
    assert len(federation.eye.runs) == runs


@pytest.mark.parametrize("status", ["lost", "stopped"])
async def test_a_new_ledger_is_no_new_run_where_the_broker_knows_of_one_that_is_not_finished(
    federation: Federation, status: str
) -> None:
    state = {"status": status, "run": "5" * 32, "term": 3, "server_id": "0" * 16, "link": 1, "host": "h", "round": 9}
    known = ServerState.model_validate(state)
    await federation.retain("server", known.encode())
    refused = federation.server(rounds=PACE, name="new")
    await refused.failed(
        6, "holds no run, but the broker has run 55555555 of host h, which is not finished", "put back", "--replace"
    )
    await federation.server("--replace", rounds=PACE, name="new").says("in charge", term=4)


async def test_a_finished_run_on_the_broker_makes_way_for_a_new_one(federation: Federation) -> None:
    state = {"status": "finished", "run": "5" * 32, "term": 3, "server_id": "0" * 16, "link": 1, "host": "h"}
    await federation.retain("server", ServerState.model_validate({**state, "round": 9}).encode())
    await federation.server(rounds=PACE).says("in charge", term=4)
