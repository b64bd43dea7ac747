"""The ledger of buffered runs and of displacements: what waits, what closes, what is forgotten, what is replayed."""

from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.core.path import digest
from meerkat_mq.core.replica import Replica
from meerkat_mq.errors import LedgerError
from meerkat_mq.ledger.recovery import recovered, resumed
from meerkat_mq.ledger.run import Run
from meerkat_mq.ledger.snapshots import Snapshots
from tests.ledger.ledgers import Writer, alter
from tests.ledger.stores import sent, update

MIXED: dict[str, Any] = {"nodes": 4, "values": {1: "int8", 3: "bfloat16"}}


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    """Buffered, updates up to 2 versions old."""
    return Writer(tmp_path, max_staleness=2, values={2: "int8"})


@pytest.mark.parametrize("change", ["blob = 'x'", "size = 'x'", "steps = NULL", "scalars = zeroblob(4)"])
def test_a_row_that_no_server_writes(writer: Writer, change: str) -> None:
    sent(writer.ledger, 0, 1)
    alter(writer.folder, f"UPDATE updates SET {change}")
    with pytest.raises(LedgerError, match=r"holds in versions -?[0-9]+ to [0-9]+ an update that no server writes"):
        writer.ledger.open_updates()


# --- replay ---


def written(folder: Path, count: int = 6, **what: Any) -> tuple[Writer, Run]:
    writer = Writer(folder, count=count, **what)
    for _ in range(count - 1):
        writer.round()
    return writer, Run(writer.run, writer.settings, writer.mask, b"", writer.ledger.rules)


def recover(writer: Writer, run: Run) -> Replica:
    return recovered(writer.ledger, run, Snapshots(writer.ledger, writer.run))


def test_recovery_adds_the_displacements(tmp_path: Path) -> None:
    writer, run = written(tmp_path, **MIXED)
    assert digest(recover(writer, run).theta) == digest(writer.replica.theta)
    blob = writer.entries[2].displacement
    assert blob is not None
    alter(tmp_path, "DELETE FROM blobs WHERE hash = ?", blob.blob)
    with pytest.raises(LedgerError, match=f"lacks the displacement {blob.blob.hex()}; restore it from a backup"):
        recover(writer, run)


@pytest.mark.parametrize("digest_every", [1, 2, 5])
def test_a_machine_resumes_with_what_the_window_holds(tmp_path: Path, digest_every: int) -> None:
    writer, run = written(tmp_path, max_staleness=3, digest_every=digest_every, count=10)
    waiting = update(7, 0)
    alter(tmp_path, "DELETE FROM updates WHERE version = 7 AND slot = 0")
    writer.ledger.commit_updates([waiting])
    machine = resumed(writer.ledger, run, term=1, server_id="5" * 16)
    due = {version: version - version % digest_every for version in range(6, 10)}
    digests = {entry.version + 1: entry.digest for entry in writer.entries} | {0: digest(writer.mask.theta_0)}
    window = machine._window
    assert {version: window.base(version) for version in range(5, 10)} == {5: None} | {
        version: digests[at] for version, at in due.items()
    }
    assert window.acknowledged == {0: 8, 1: 8, 2: 8}
    assert window.open() == {(7, "n0"): waiting}
