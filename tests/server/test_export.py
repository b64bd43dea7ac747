"""What a card says of a run is what the ledger beside the difference file says."""

from pathlib import Path

import pytest

from meerkat_mq.core.path import digest
from meerkat_mq.errors import RunMismatch
from meerkat_mq.server.export import exported
from meerkat_mq.wire.snapshot import Difference
from tests.ledger.ledgers import RUN, Writer


def left(folder: Path, rounds: int = 6) -> tuple[Writer, Path]:
    """A run with evaluations and a difference file of so many rounds."""
    writer = Writer(folder)
    writer.ledger.commit_metrics(0, {"accuracy": 0.5})
    for _ in range(rounds):
        writer.round()
    writer.see(0, "online", 1.0)
    writer.ledger.commit_metrics(4, {"accuracy": 0.75})
    return writer, writer.difference()


def test_the_ledgers_head_figures_and_nodes(tmp_path: Path) -> None:
    writer, file = left(tmp_path)
    writer.ledger.close()
    found = exported("some/model", Difference.load(file), file, encoder=False)
    assert found.run is not None
    assert (found.version, found.run_id, found.run.rounds) == (6, RUN.hex(), 6)
    assert found.run.head == writer.head.hex()
    assert found.digest == digest(writer.replica.theta).hex()
    assert (found.run.before, found.run.after, found.run.evaluated) == ({"accuracy": 0.5}, {"accuracy": 0.75}, 4)
    assert (found.run.nodes, found.run.rows) == (3, 50)
    assert found.run.settings["lr"] == "2.0"


def test_what_is_younger_than_the_difference_is_not_told(tmp_path: Path) -> None:
    writer, file = left(tmp_path, rounds=3)
    head = writer.head.hex()
    writer.round()
    writer.ledger.close()
    found = exported("some/model", Difference.load(file), file, encoder=False).run
    assert found is not None
    assert (found.head, found.after, found.evaluated) == (head, {}, None)


def test_no_ledger_or_another_runs(tmp_path: Path) -> None:
    writer, file = left(tmp_path / "state")
    writer.ledger.close()
    alone = tmp_path / "difference.mkd"
    alone.write_bytes(file.read_bytes())
    assert exported("m", Difference.load(alone), alone, encoder=False).run is None
    found = Difference.load(file)
    Difference(found.mask, found.theta, bytes(16), found.version).save(file)
    assert exported("m", Difference.load(file), file, encoder=False).run is None


@pytest.mark.parametrize(("version", "words"), [(7, "the ledger beside it ends at version 6"), (5, "holds a theta of")])
def test_a_difference_that_is_not_the_ledgers(tmp_path: Path, version: int, words: str) -> None:
    writer, file = left(tmp_path)
    writer.ledger.close()
    Difference(writer.mask, writer.replica.theta, RUN, version).save(file)
    with pytest.raises(RunMismatch, match=words):
        exported("m", Difference.load(file), file, encoder=False)
