"""Verification: a clean ledger passes; of an altered one, the first entry that does not hold is named, and why."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import Coefficient, digest
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.errors import LedgerError, MaskError, RunMismatch
from meerkat_mq.ledger.files import mask_file
from meerkat_mq.ledger.folder import verify_folder
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.ledger.verify import verify_ledger
from meerkat_mq.rounds.policy import terms_of
from meerkat_mq.rounds.records import Verdict
from meerkat_mq.wire.frames import encode_entry
from tests.ledger.ledgers import Writer, alter, alter_entry, flip, write

BAD = 3  # the entry that tests alter


def fails(folder: Path, where: str, *words: str) -> None:
    with pytest.raises(RunMismatch) as caught:
        verify_folder(folder)
    assert caught.value.where == where
    for word in words:
        assert word in caught.value.problem
    assert caught.value.remedy
    assert caught.value.exit_code == 6


# --- what holds ---


@pytest.mark.parametrize(
    "what",
    [
        {},
        {"nodes": 7, "lanes": 2, "steps": 3, "weigh_by_rows": True},
        {"nodes": 6, "aggregate": "trimmed-mean"},
        {"digest_every": 3, "absent": {(1, 0), (1, 1), (4, 2)}},
        {
            "nodes": 4,
            "refused": {
                (1, 0): Verdict.NOT_FINITE,
                (2, 1): Verdict.TOO_LARGE,
                (2, 2): Verdict.OUTLIER,
                (5, 3): Verdict.AGAINST,
            },
        },
    ],
    ids=["plain", "lanes", "trimmed", "digests", "refused"],
)
def test_a_clean_ledger_passes(tmp_path: Path, what: dict[str, object]) -> None:
    writer = write(tmp_path, **what)
    steps: list[tuple[int, int]] = []
    found = verify_folder(tmp_path, progress=lambda done, total: steps.append((done, total)))
    updates = sum(len(writer.records(version)) for version in range(writer.count))
    assert (found.rounds, found.updates) == (writer.count, updates)
    assert found.digest == digest(writer.replica.theta)
    assert steps == [(done, writer.count) for done in range(writer.count + 1)]


@settings(max_examples=25)
@given(data=st.data())
def test_any_flipped_bit_of_any_entry_is_found_there(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    lanes, digest_every = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 2]))
    writer = write(folder, count=4, lanes=lanes, digest_every=digest_every)
    version = data.draw(st.integers(0, writer.count - 1))
    blob = bytearray(encode_entry(writer.entries[version]))
    bit = data.draw(st.integers(0, 8 * len(blob) - 1))
    blob[bit // 8] ^= 1 << bit % 8
    alter(folder, "UPDATE entries SET entry = ? WHERE version = ?", bytes(blob), version)
    fails(folder, f"entry {version}")


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.hear()
    found = verify_folder(tmp_path)
    assert (found.rounds, found.updates, found.digest) == (0, 0, digest(writer.mask.theta_0))


def test_a_server_may_write_meanwhile(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    for _ in range(3):
        writer.round()
    writer.snapshot()
    writer.difference()
    theta = digest(writer.replica.theta)

    def write_on(done: int, total: int) -> None:
        if done == 1:
            old = writer.snapshot()
            for _ in range(2):
                writer.round()
                writer.snapshot()
            writer.difference()
            assert not old.exists()
        assert total == 3

    found = verify_folder(tmp_path, progress=write_on)
    assert (found.rounds, found.digest) == (3, theta)
    assert verify_folder(tmp_path).rounds == 5


# --- entries ---


def test_a_coefficient(tmp_path: Path) -> None:
    entry = write(tmp_path).entries[BAD]
    term = entry.terms[0]
    alter_entry(tmp_path, BAD, replace(entry, terms=(replace(term, coefficient=-term.coefficient),)))
    fails(tmp_path, "entry 3", f"its term 0 is lane 0, step 0, coefficient {-term.coefficient:.9g}; its updates give")


def test_a_coefficient_by_someone_who_mends_the_chain(tmp_path: Path) -> None:
    """Digests and hashes that fit do not help: the stored updates say another thing."""
    writer = write(tmp_path)
    forger = Writer(tmp_path / "forged")
    for version, true in enumerate(writer.entries):
        terms = (Coefficient(0, 0, 0.5),) if version == BAD else true.terms
        forged = replace(true, terms=terms, previous=forger.head, digest=forger.replica.apply(terms))
        forger.entries.append(forged)
        alter_entry(tmp_path, version, forged)
    fails(tmp_path, "entry 3", "coefficient 0.5; its updates give lane 0, step 0, coefficient")


def test_terms_too_few_and_too_many(tmp_path: Path) -> None:
    entry = write(tmp_path, lanes=2).entries[BAD]
    alter_entry(tmp_path, BAD, replace(entry, terms=entry.terms[:1]))
    fails(tmp_path, "entry 3", "its term 1 is none; its updates give lane 1")
    alter_entry(tmp_path, BAD, replace(entry, terms=(*entry.terms, Coefficient(1, 1, 1.0))))
    fails(tmp_path, "entry 3", "its term 2 is lane 1, step 1, coefficient 1; its updates give none")


@pytest.mark.parametrize("what", ["digest", "previous"])
def test_digest_and_previous(tmp_path: Path, what: str) -> None:
    entry = write(tmp_path).entries[BAD]
    changed = replace(entry, digest=bytes(16)) if what == "digest" else replace(entry, previous=bytes(16))
    alter_entry(tmp_path, BAD, changed)
    fails(tmp_path, "entry 3", f"its {what} is {bytes(16).hex()}; ", getattr(entry, what).hex())


def test_a_digest_that_is_not_due(tmp_path: Path) -> None:
    entry = write(tmp_path, digest_every=2).entries[2]
    alter_entry(tmp_path, 2, replace(entry, digest=bytes(range(16))))
    fails(tmp_path, "entry 2", "its digest is")


def test_a_missing_entry(tmp_path: Path) -> None:
    write(tmp_path)
    alter(tmp_path, "DELETE FROM entries WHERE version = ?", BAD)
    fails(tmp_path, "entry 3", "is missing; entry 4 stands in its place")


def test_swapped_entries(tmp_path: Path) -> None:
    entries = write(tmp_path).entries
    alter_entry(tmp_path, BAD, entries[4])
    alter_entry(tmp_path, 4, entries[BAD])
    fails(tmp_path, "entry 3", "is missing; entry 4 stands in its place")
    alter_entry(tmp_path, BAD, replace(entries[4], version=BAD))
    fails(tmp_path, "entry 3", "its previous is")


def test_an_entry_of_an_earlier_term(tmp_path: Path) -> None:
    write(tmp_path)
    alter(tmp_path, "UPDATE entries SET term = 2 WHERE version < ?", BAD)
    fails(tmp_path, "entry 3", "was written under term 1, after one of term 2")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET entry = x'0300' WHERE version = 3",
        "UPDATE entries SET entry = 'text' WHERE version = 3",
        "UPDATE updates SET scalars = x'0000' WHERE version = 3",
        "UPDATE updates SET scalars = x'' WHERE version = 3",
        "UPDATE updates SET scalars = zeroblob(8) WHERE version = 3",
        "UPDATE updates SET verdict = 99 WHERE version = 3",
        "UPDATE updates SET weight = 0 WHERE version = 3",
        "UPDATE updates SET loss = x'00' WHERE version = 3",
        "UPDATE updates SET loss = 'low' WHERE version = 3",
        "UPDATE entries SET closed = 'noon' WHERE version = 3",
    ],
)
def test_rows_that_no_server_writes(tmp_path: Path, statement: str) -> None:
    write(tmp_path)
    alter(tmp_path, statement)
    fails(tmp_path, "entry 3")


# --- updates ---


def test_a_scalar(tmp_path: Path) -> None:
    write(tmp_path)
    alter(tmp_path, "UPDATE updates SET scalars = zeroblob(4) WHERE version = 3 AND slot = 1")
    fails(tmp_path, "entry 3", "its term 0 is", "its updates give")


@pytest.mark.parametrize("by_rows", [True, False])
def test_a_weight(tmp_path: Path, by_rows: bool) -> None:
    write(tmp_path, weigh_by_rows=by_rows)
    alter(tmp_path, "UPDATE updates SET weight = weight + 1 WHERE version = 3 AND slot = 1")
    fails(tmp_path, "entry 3", "its term 0 is", "its updates give")


def test_missing_and_extra_updates(tmp_path: Path) -> None:
    write(tmp_path, absent={(BAD, 0)})
    alter(tmp_path, "INSERT INTO updates VALUES (3, 0, 7, 1, zeroblob(4), 1.0, 0, 3, NULL, NULL, NULL)")
    fails(tmp_path, "entry 3", "its term 0 is", "its updates give")
    alter(tmp_path, "DELETE FROM updates WHERE version = 3 AND slot = 0")
    assert verify_folder(tmp_path).rounds == 6
    alter(tmp_path, "DELETE FROM updates WHERE version = 3 AND slot = 1")
    fails(tmp_path, "entry 3", "its term 0 is", "its updates give")


def test_an_update_of_a_slot_that_nobody_has(tmp_path: Path) -> None:
    write(tmp_path)
    alter(tmp_path, "INSERT INTO updates VALUES (3, 9, 7, 1, zeroblob(4), 1.0, 0, 3, NULL, NULL, NULL)")
    fails(tmp_path, "entry 3", "no node has slot 9")


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (Verdict.ACCEPTED, Verdict.OUTLIER, "its updates give"),
        (Verdict.AGAINST, Verdict.ACCEPTED, "its updates give"),
        (Verdict.NOT_FINITE, Verdict.ACCEPTED, "its update of n1 is kept as accepted, but is not finite"),
        (Verdict.TOO_LARGE, Verdict.OUTLIER, "its update of n1 is kept as outlier, but is too large"),
        (Verdict.ACCEPTED, Verdict.NOT_FINITE, "its update of n1 is kept as not finite, but is accepted"),
    ],
)
def test_a_verdict(tmp_path: Path, before: Verdict, after: Verdict, words: str) -> None:
    write(tmp_path, refused={(BAD, 1): before})
    alter(tmp_path, "UPDATE updates SET verdict = ? WHERE version = 3 AND slot = 1", int(after))
    fails(tmp_path, "entry 3", words)


def test_a_later_error_waits_for_the_first(tmp_path: Path) -> None:
    entries = write(tmp_path).entries
    for version in (5, BAD, 4):
        alter_entry(tmp_path, version, replace(entries[version], digest=bytes(16)))
    fails(tmp_path, "entry 3")


# --- the mask ---


def test_another_mask(tmp_path: Path) -> None:
    writer = write(tmp_path)
    with closing(Ledger.read(tmp_path / LEDGER_FILE)) as ledger, pytest.raises(RunMismatch) as caught:
        verify_ledger(ledger, toy_mask(41))
    assert caught.value.where == "mask"
    assert f"the run's is {writer.mask.hash.hex()}" in caught.value.problem


def test_where_the_mask_comes_from(tmp_path: Path) -> None:
    mask = replace(toy_mask(20), fingerprint=b"f" * 32)
    writer = write(tmp_path / "run", mask=mask, engine="transformers")
    with pytest.raises(MaskError, match=rf"mask-{mask.hash.hex()}\.mkm: is missing; name the run's mask file with --m"):
        verify_folder(tmp_path / "run")
    mask.save(tmp_path / "m.mkm")
    assert verify_folder(tmp_path / "run", mask=tmp_path / "m.mkm").rounds == 6
    mask.save(mask_file(writer.folder, mask.hash))
    assert verify_folder(tmp_path / "run").digest == digest(writer.replica.theta)


# --- no ledger ---


def foreign(file: Path) -> None:
    file.write_bytes(b"SQLite format 3\0" + bytes(500))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda file: None, "there is no ledger"),
        (lambda file: file.write_text("hello"), "is not a SQLite file"),
        (foreign, "is a SQLite file of another program"),
        (lambda file: Ledger.open(file).close(), "holds no run yet"),
    ],
    ids=["none", "text", "foreign", "empty"],
)
def test_no_ledger(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    make(tmp_path / LEDGER_FILE)
    with pytest.raises(LedgerError) as caught:
        verify_folder(tmp_path)
    assert str(tmp_path / LEDGER_FILE) == caught.value.where
    assert words in caught.value.problem


def test_what_terms_skip(tmp_path: Path) -> None:
    """The maker of these ledgers leaves refused updates out, as the server does."""
    writer = Writer(tmp_path, refused={(0, 1): Verdict.NOT_FINITE})
    records = writer.records(0)
    assert terms_of(records, writer.settings, 0) == terms_of([records[0], records[2]], writer.settings, 0)


def test_a_mask_that_is_damaged(tmp_path: Path) -> None:
    writer = write(tmp_path, mask=Mask(toy_mask(20).matrices, b"f" * 32, bytes(32)), engine="transformers")
    file = mask_file(tmp_path, writer.mask.hash)
    writer.mask.save(file)
    flip(file, -1)
    fails(tmp_path, "mask", "has hash")
