"""The ledger of buffered runs and of displacements: what waits, what closes, what is forgotten, what is replayed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meerkat_mq.core.path import Displacement, Entry, Term, digest
from meerkat_mq.core.replica import Replica
from meerkat_mq.errors import LedgerError
from meerkat_mq.ledger.recovery import recovered, resumed
from meerkat_mq.ledger.run import Run
from meerkat_mq.ledger.snapshots import Snapshots
from meerkat_mq.ledger.sqlite import Ledger
from meerkat_mq.rounds.records import UpdateRecord, Verdict
from meerkat_mq.wire.messages import Values
from meerkat_mq.wire.values import encode_values
from tests.ledger.ledgers import Writer, alter, close_all

MIXED: dict[str, Any] = {"nodes": 4, "values": {1: "int8", 3: "bfloat16"}}


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    """Buffered, updates up to 2 versions old."""
    return Writer(tmp_path, max_staleness=2, values={2: "int8"})


def update(version: int, slot: int, **changes: Any) -> UpdateRecord:
    return replace(UpdateRecord(version, f"n{slot}", slot, 7, 1, (0.5,), 0.5), **changes)


def close(ledger: Ledger, *records: UpdateRecord, displacement: Displacement | None = None) -> None:
    entry = Entry(ledger.version, (Term(0, 0, 0.5),), bytes(16), bytes(16), displacement)
    ledger.commit_entry(entry, records, 3, overdue=False)


def sent(ledger: Ledger, version: int, number: int, **changes: Any) -> UpdateRecord:
    """A values node's update, which is kept."""
    blob = encode_values(np.full(40, number, dtype=np.float32), "int8")
    found = update(version, 2, scalars=(), values=Values(ledger.keep_blob(blob), len(blob), 5), **changes)
    ledger.commit_updates([found])
    return found


def test_an_update_closes_with_the_entry_that_names_it_and_waits_until_then(writer: Writer) -> None:
    ledger = writer.ledger
    first, second, third = update(0, 0), update(0, 1), update(1, 0)
    ledger.commit_updates([first, second])
    close(ledger, first)
    assert (ledger.records(0), ledger.open_updates()) == ((first,), (second,))
    ledger.commit_updates([third])
    refused = replace(second, verdict=Verdict.OUTLIER)
    close(ledger, refused, third)
    assert (ledger.records(1), ledger.open_updates()) == ((refused, third), ())
    assert ledger.past(9) == [(first,), (refused, third)]
    assert ledger.past(1) == [(refused, third)]
    assert ledger.staleness(9) == pytest.approx(1 / 3)
    assert ledger.given_by("n0", 0, 9) == ((0, first), (1, third))
    assert ledger.heard() == {"n0": 1, "n1": 0}


def test_what_is_too_old_for_any_entry_is_forgotten(writer: Writer) -> None:
    ledger = writer.ledger
    waits = [update(0, 0), update(1, 0), update(2, 0)]
    ledger.commit_updates(waits)
    for left in (waits, waits, waits, waits[1:], waits[2:], []):
        assert list(ledger.open_updates()) == left
        close(ledger)
    late = update(ledger.version - 3, 1)  # on its way when the last entry closed
    ledger.commit_updates([late])
    assert ledger.open_updates() == ()
    close(ledger)
    assert ledger.given_by("n1", 0, 99) == ()
    assert ledger.astray() is None


def test_a_displacement_stays_as_long_as_an_update_or_an_entry_names_it(writer: Writer) -> None:
    ledger = writer.ledger
    kept, refused, waiting = sent(ledger, 0, 1), sent(ledger, 1, 2, verdict=Verdict.TOO_LARGE), sent(ledger, 2, 3)
    mean, nobodys = ledger.keep_blob(b"mean"), ledger.keep_blob(b"nobody's")
    close(ledger, kept, refused, displacement=Displacement(mean, 4))

    def held(*records: UpdateRecord) -> list[bool]:
        return [ledger.blob(record.values.blob) is not None for record in records if record.values]

    assert held(kept, refused, waiting) == [True, True, True]
    assert (ledger.blob(mean), ledger.blob(nobodys)) == (b"mean", None)
    for _ in range(4):
        close(ledger)
    assert held(kept, refused, waiting) == [True, True, False]
    assert ledger.blob(mean) == b"mean"


def test_two_updates_may_name_one_displacement(writer: Writer) -> None:
    ledger = writer.ledger
    kept, waiting = sent(ledger, 0, 1), sent(ledger, 1, 1)
    close(ledger, kept)
    for _ in range(4):
        close(ledger)
    assert ledger.open_updates() == ()
    assert waiting.values is not None
    assert ledger.blob(waiting.values.blob) is not None


def test_what_a_killed_server_kept_for_nobody_goes_with_the_next_term(writer: Writer) -> None:
    ledger = writer.ledger
    kept, nobodys = sent(ledger, 0, 1), ledger.keep_blob(b"nobody's")
    again = Ledger.open(ledger.path)
    again.take_term(0, "6" * 16, "here")
    assert kept.values is not None
    assert again.blob(kept.values.blob) is not None
    assert again.blob(nobodys) is None
    again.close()


def test_nodes_get_the_displacements_of_entries_only(writer: Writer) -> None:
    ledger = writer.ledger
    record, mean = sent(ledger, 0, 1), ledger.keep_blob(b"mean")
    close(ledger, record, displacement=Displacement(mean, 4))
    assert record.values is not None
    assert (ledger.displacement(mean), ledger.displacement(record.values.blob)) == (b"mean", None)
    assert ledger.stretch(0) == (1, 66, 4)


@pytest.mark.parametrize("change", ["blob = 'x'", "size = 'x'", "steps = NULL", "scalars = zeroblob(4)"])
def test_a_row_that_no_server_writes(writer: Writer, change: str) -> None:
    sent(writer.ledger, 0, 1)
    alter(writer.folder, f"UPDATE updates SET {change}")
    with pytest.raises(LedgerError, match=r"holds since version -?[0-9]+ an update that no server writes"):
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
