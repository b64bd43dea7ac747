"""Verification of buffered runs and of displacements: an age, a place or a byte that is not what it was is found."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meerkat_mq.core.path import Displacement, digest, short_hash
from meerkat_mq.errors import LedgerError, RunMismatch
from meerkat_mq.ledger.folder import verify_folder
from meerkat_mq.ledger.inspect import path_shown, rebuilt_path, round_shown, run_shown
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.rounds.records import Verdict
from meerkat_mq.wire.messages import in_words
from meerkat_mq.wire.values import encode_values
from tests.ledger.ledgers import WEIGHTS, Writer, alter, alter_entry, write

AGES = {(2, 0): 2, (3, 1): 1, (4, 0): 3, (4, 2): 1}
BUFFERED: dict[str, Any] = {
    "max_staleness": 3,
    "ages": AGES,
    "absent": {(0, 0), (1, 0), (3, 0), (2, 1), (3, 2)},
    "steps": 3,
    "partial": {(4, 0): 1, (5, 1): 2},
}
MIXED: dict[str, Any] = {"nodes": 5, "values": {1: "int8", 3: "bfloat16", 4: "float32"}}
COMPARED: dict[str, Any] = MIXED | {"nodes": 6, "steps": 4, "aggregate": "clipped-mean", "count": 9}


def fails(folder: Path, version: int, *words: str) -> None:
    with pytest.raises(RunMismatch) as caught:
        verify_folder(folder)
    assert caught.value.where == f"entry {version}"
    for word in words:
        assert word in caught.value.problem


@pytest.mark.parametrize(
    "what",
    [
        BUFFERED,
        BUFFERED | {"nodes": 6, "lanes": 2, "perturbations": 2, "weigh_by_rows": True, "digest_every": 2},
        MIXED,
        MIXED | BUFFERED | {"aggregate": "trimmed-mean"},
        MIXED | {"absent": {(2, slot) for slot in (0, 2)}, "refused": {(3, 1): Verdict.OUTLIER}},
        {"nodes": 2, "values": {0: "int8", 1: "int8"}, "absent": {(1, 0)}},
        COMPARED,
        COMPARED | BUFFERED | {"nodes": 6, "lanes": 2},
        COMPARED | {"measures": False},
    ],
    ids=[
        "buffered",
        "lanes",
        "mixed",
        "mixed and buffered",
        "refused",
        "values only",
        "compared",
        "compared and buffered",
        "of an older server",
    ],
)
def test_a_clean_ledger_passes(tmp_path: Path, what: dict[str, Any]) -> None:
    writer = write(tmp_path, **what)
    found = verify_folder(tmp_path)
    assert (found.rounds, found.digest) == (writer.count, digest(writer.replica.theta))
    assert found.updates == sum(len(writer.records(version)) for version in range(writer.count))


def test_ages_and_displacements_are_in_the_entries(tmp_path: Path) -> None:
    entries = write(tmp_path, **(MIXED | BUFFERED)).entries
    assert {term.age for term in entries[4].terms} == {1, 3}
    assert all(entry.displacement for entry in entries)


# --- buffered ---


def test_an_age(tmp_path: Path) -> None:
    entry = write(tmp_path, **BUFFERED).entries[4]
    aged = next(index for index, term in enumerate(entry.terms) if term.age == 3)
    terms = tuple(replace(term, age=2) if at == aged else term for at, term in enumerate(entry.terms))
    alter_entry(tmp_path, 4, replace(entry, terms=terms))
    fails(tmp_path, 4, f"its term {aged} is age 2, lane 0", "its updates give age 3, lane 0")


def test_an_update_that_is_moved_to_another_base_version(tmp_path: Path) -> None:
    write(tmp_path, **BUFFERED)
    alter(tmp_path, "UPDATE updates SET version = 2 WHERE entry = 4 AND slot = 0")
    fails(tmp_path, 4, "its updates give age 2, lane 0")


@pytest.mark.parametrize(("to", "where"), [(5, 3), (2, 2)])
def test_an_update_that_is_moved_to_another_entry(tmp_path: Path, to: int, where: int) -> None:
    write(tmp_path, **BUFFERED)
    alter(tmp_path, "UPDATE updates SET entry = ? WHERE entry = 3 AND slot = 1", to)
    fails(tmp_path, where, "its updates give")


@pytest.mark.parametrize(
    "change",
    [
        "entry = 6 WHERE version = 2 AND slot = 1",
        "entry = 1 WHERE version = 2 AND slot = 1",
        "entry = 'x' WHERE version = 2 AND slot = 1",
        "entry = 5 WHERE version = 0 AND slot = 2",
        "entry = NULL WHERE version = 0 AND slot = 2",
    ],
)
def test_a_refused_update_that_is_moved_to_where_no_entry_looks(tmp_path: Path, change: str) -> None:
    write(tmp_path, max_staleness=3, refused={(0, 2): Verdict.OUTLIER, (2, 1): Verdict.OUTLIER})
    alter(tmp_path, f"UPDATE updates SET {change}")
    with pytest.raises(RunMismatch, match="an update from its theta is in no entry where it can be"):
        verify_folder(tmp_path)


def test_an_update_from_a_theta_that_was_too_old(tmp_path: Path) -> None:
    write(tmp_path, max_staleness=1)
    alter(tmp_path, "UPDATE updates SET version = 77 WHERE entry = 3 AND slot = 2")
    with pytest.raises(RunMismatch):
        verify_folder(tmp_path)


def test_a_partial_path_of_a_synchronous_run(tmp_path: Path) -> None:
    write(tmp_path, steps=3, partial={(2, 1): 2})
    fails(tmp_path, 2, "its update of n1 has 2 projected gradients, but was asked for 3")


@pytest.mark.parametrize("scalars", [0, 1, 3, 8])
def test_a_path_that_is_no_part_of_a_round(tmp_path: Path, scalars: int) -> None:
    write(tmp_path, max_staleness=2, steps=3, perturbations=2)
    alter(tmp_path, "UPDATE updates SET scalars = zeroblob(?) WHERE version = 2 AND slot = 1", 4 * scalars)
    fails(tmp_path, 2, f"its update of n1 has {scalars} projected gradients, but was asked for 6")


# --- displacements ---


def blob_of(folder: Path, version: int, slot: int) -> bytes:
    with closing(sqlite3.connect(folder / LEDGER_FILE)) as connection:
        query = "SELECT data FROM blobs JOIN updates ON blob = hash WHERE version = ? AND slot = ?"
        return bytes(connection.execute(query, (version, slot)).fetchone()[0])


def test_a_flipped_byte_of_what_a_node_sent(tmp_path: Path) -> None:
    write(tmp_path, **MIXED)
    blob = bytearray(blob_of(tmp_path, 2, 3))
    blob[-1] ^= 1
    alter(tmp_path, "UPDATE blobs SET data = ? WHERE hash = ?", bytes(blob), short_hash(blob_of(tmp_path, 2, 3)))
    fails(tmp_path, 2, "(values: hash", "is not")


def test_a_flipped_byte_of_what_an_entry_adds(tmp_path: Path) -> None:
    added = write(tmp_path, **MIXED).entries[2].displacement
    assert added is not None
    with closing(sqlite3.connect(tmp_path / LEDGER_FILE)) as connection:
        ((blob,),) = connection.execute("SELECT data FROM blobs WHERE hash = ?", (added.blob,))
    alter(tmp_path, "UPDATE blobs SET data = ? WHERE hash = ?", bytes([*blob[:-1], blob[-1] ^ 1]), added.blob)
    fails(tmp_path, 2, "(values: hash", "is not")


def test_another_displacement_of_a_node(tmp_path: Path) -> None:
    write(tmp_path, **MIXED)
    other = encode_values(np.full(WEIGHTS, 0.5, dtype=np.float32), "int8")
    alter(tmp_path, "INSERT INTO blobs VALUES (?, ?)", short_hash(other), other)
    change = "UPDATE updates SET blob = ?, size = ? WHERE version = 2 AND slot = 3"
    alter(tmp_path, change, short_hash(other), len(other))
    fails(tmp_path, 2, "its displacement is not the mean of its updates'")


def test_a_displacement_that_nobody_kept(tmp_path: Path) -> None:
    write(tmp_path, **MIXED)
    alter(tmp_path, "DELETE FROM blobs WHERE hash = ?", short_hash(blob_of(tmp_path, 2, 3)))
    fails(tmp_path, 2, "lacks the displacement")


def test_a_displacement_of_an_entry_by_someone_who_keeps_it_too(tmp_path: Path) -> None:
    entry = write(tmp_path, **MIXED).entries[2]
    other = encode_values(np.full(WEIGHTS, 0.5, dtype=np.float32), "bfloat16")
    alter(tmp_path, "INSERT INTO blobs VALUES (?, ?)", short_hash(other), other)
    alter(tmp_path, "UPDATE displacements SET hash = ? WHERE version = 2", short_hash(other))
    alter_entry(tmp_path, 2, replace(entry, displacement=Displacement(short_hash(other), len(other))))
    fails(tmp_path, 2, "its displacement is not the mean of its updates'")


def test_an_entry_without_its_displacement_and_one_with_another_size(tmp_path: Path) -> None:
    entry = write(tmp_path, **MIXED).entries[2]
    alter_entry(tmp_path, 2, replace(entry, displacement=None))
    fails(tmp_path, 2, "its displacement is none; its updates give one")
    assert entry.displacement is not None
    alter_entry(tmp_path, 2, replace(entry, displacement=replace(entry.displacement, size=7)))
    fails(tmp_path, 2, "it is said to be of 7")


def test_a_displacement_that_nodes_cannot_get(tmp_path: Path) -> None:
    write(tmp_path, **MIXED)
    alter(tmp_path, "DELETE FROM displacements WHERE version = 2")
    fails(tmp_path, 2, "its displacement is of 0 bytes")


def test_a_displacement_in_a_run_that_takes_none(tmp_path: Path) -> None:
    write(tmp_path, **MIXED)
    alter(tmp_path, """UPDATE run SET descriptor = REPLACE(descriptor, '"values":true', '"values":false')""")
    fails(tmp_path, 0, "its update of n1 is a displacement; this run takes none")


@pytest.mark.parametrize(("change", "words"), [("verdict = 1", "is kept as not finite, but is accepted"),
                                               ("loss = 9e999", "is kept as accepted, but is not finite"),
                                               ("size = 3", "it is said to be of 3")])  # fmt: skip
def test_what_is_said_of_a_displacement(tmp_path: Path, change: str, words: str) -> None:
    write(tmp_path, **MIXED)
    alter(tmp_path, f"UPDATE updates SET {change} WHERE version = 2 AND slot = 3")
    fails(tmp_path, 2, words)


def test_a_displacement_too_large_to_apply_is_kept_as_refused(tmp_path: Path) -> None:
    write(tmp_path, **MIXED)
    huge = encode_values(np.full(WEIGHTS, 2.0**127 * 1.5, dtype=np.float32), "float32")
    alter(tmp_path, "INSERT INTO blobs VALUES (?, ?)", short_hash(huge), huge)
    alter(tmp_path, "UPDATE updates SET blob = ?, size = ? WHERE version = 2 AND slot = 3", short_hash(huge), len(huge))
    fails(tmp_path, 2, "its update of n3 is kept as accepted, but is too large")


# --- compared ---


def numbers_of(folder: Path, version: int, slot: int) -> list[float]:
    with closing(sqlite3.connect(folder / LEDGER_FILE)) as connection:
        query = "SELECT scalars FROM updates WHERE version = ? AND slot = ?"
        (packed,) = connection.execute(query, (version, slot)).fetchone()
        return [float(number) for number in np.frombuffer(packed, "<f4")]


@pytest.mark.parametrize(("place", "what"), [(0, "size"), (1, "agreement"), (2, "along"), (5, "along")])
def test_a_displacement_that_was_measured_as_another_one(tmp_path: Path, place: int, what: str) -> None:
    write(tmp_path, **COMPARED)
    numbers = numbers_of(tmp_path, 2, 3)
    assert len(numbers) == 2 + 4
    numbers[place] = numbers[place] * 0.5
    change = "UPDATE updates SET scalars = ? WHERE version = 2 AND slot = 3"
    alter(tmp_path, change, np.array(numbers, "<f4").tobytes())
    fails(tmp_path, 2, "its measure of n3's displacement is size", what, "it is size")


def test_a_displacement_that_is_not_measured_any_more(tmp_path: Path) -> None:
    write(tmp_path, **COMPARED)
    alter(tmp_path, "UPDATE updates SET scalars = zeroblob(0) WHERE version = 2 AND blob IS NOT NULL")
    fails(tmp_path, 2, "its measure of n1's displacement is none; it is size")


@pytest.mark.parametrize("numbers", [[1.0, 0.5], [-1.0, 0.5, 0.0], [1.0, float("nan"), 0.0]])
def test_what_no_displacement_can_be(tmp_path: Path, numbers: list[float]) -> None:
    write(tmp_path, **COMPARED)
    change = "UPDATE updates SET scalars = ? WHERE version = 2 AND slot = 3"
    alter(tmp_path, change, np.array(numbers, "<f4").tobytes())
    with pytest.raises((RunMismatch, LedgerError), match="a displacement is measured as"):
        verify_folder(tmp_path)


@pytest.mark.parametrize(
    ("before", "after"), [(Verdict.ACCEPTED, Verdict.AGAINST), (Verdict.AGAINST, Verdict.ACCEPTED)]
)
def test_a_verdict_on_a_displacement_that_its_measures_do_not_give(
    tmp_path: Path, before: Verdict, after: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def displacement(self: Writer, version: int, slot: int) -> bytes:
        values = np.random.default_rng(version).normal(0, 0.01, self.mask.size)
        return encode_values((-values if slot == 4 else values).astype(np.float32), "float32")

    monkeypatch.setattr(Writer, "displacement", displacement)
    writer = write(tmp_path, **COMPARED)
    found = {record.slot: record.verdict for record in Ledger.read(tmp_path / LEDGER_FILE).records(2)}
    assert (found[4], found[1], found[3]) == (Verdict.AGAINST, Verdict.ACCEPTED, Verdict.ACCEPTED)
    assert verify_folder(tmp_path).rounds == writer.count
    slot = next(slot for slot, verdict in sorted(found.items(), reverse=True) if verdict is before)
    alter(tmp_path, "UPDATE updates SET verdict = ? WHERE version = 2 AND slot = ?", int(after), slot)
    fails(tmp_path, 2, f"its update of n{slot} is kept as {in_words(after)}, but is {in_words(before)}")


# --- shown and rebuilt ---


def test_what_people_see(tmp_path: Path) -> None:
    writer = Writer(tmp_path, **(MIXED | BUFFERED))
    for _ in range(writer.count):
        writer.round()
    writer.see(2, "asleep", 5.0)
    shown = run_shown(writer.ledger)
    assert shown.mode.startswith("buffered: 8 updates close a version, from theta up to 3 versions old")
    assert shown.staleness == pytest.approx(sum(AGES.values()) / 25)
    assert shown.asleep == 1
    assert [node.displacement > 0 for node in shown.nodes] == [False, True, False, True, True]
    entry = round_shown(writer.ledger, 4)
    added = writer.entries[4].displacement
    assert added is not None
    assert (entry.displacement, entry.size) == (added.blob.hex(), added.size)
    assert {(update.slot, update.age) for update in entry.updates} == {(0, 3), (1, 0), (2, 1), (3, 0), (4, 0)}
    assert {term.age for term in entry.terms} == {1, 3}
    assert [(update.round, update.entry) for update in path_shown(writer.ledger, "n0", 0, 9)] == [
        (0, 2), (1, 4), (5, 5),
    ]  # fmt: skip


def test_a_stale_update_is_rebuilt_from_its_own_theta_and_a_displacement_is_not(tmp_path: Path) -> None:
    writer = Writer(tmp_path, max_staleness=3, ages={(5, 0): 3}, absent={(2, 0)}, nodes=3, values={1: "int8"})
    for _ in range(writer.count):
        writer.round()
    (step,) = rebuilt_path(writer.ledger, writer.mask, 2, "n0")
    assert (step.round, step.g) == (2, writer.records(5)[0].scalars[0])
    with pytest.raises(RunMismatch, match="node n1: gave a displacement from theta of version 2: how it came to that"):
        next(rebuilt_path(writer.ledger, writer.mask, 2, "n1"))


def test_a_theta_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a server without guards would have written it."""
    ruinous = encode_values(np.full(WEIGHTS, 3e38, np.float32), "float32")
    with monkeypatch.context() as patched, np.errstate(over="ignore"):
        patched.setattr("meerkat_mq.core.replica.displace", lambda theta, added: np.add(theta, added, out=theta))
        patched.setattr(Writer, "displacement", lambda *of: ruinous)
        write(tmp_path, count=3, nodes=1, values={0: "float32"})
    fails(tmp_path, 0, "its update of n0 is kept as accepted, but is too large")
    monkeypatch.setattr("meerkat_mq.ledger.displacement.FARTHEST", 1e39)
    fails(tmp_path, 1, "theta is not finite after a displacement")
