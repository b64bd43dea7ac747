"""What comes late: a term, long after the ledger was read; an update, when its round is closing."""

from pathlib import Path

from meerkat_mq.core.path import Entry, digest
from meerkat_mq.ledger.run import Run
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.ledger.verify import verify_ledger
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.policy import terms_of
from tests.ledger.ledgers import OPEN, Writer
from tests.runtime.one_writer import OneWriter


def test_theta_is_the_ledgers_when_the_term_is_taken(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    for _ in range(2):
        writer.round()
    run = Run(writer.run, writer.settings, writer.mask, b"", {})
    ledger = Ledger.open(tmp_path / LEDGER_FILE)
    OPEN.append(ledger)
    it = OneWriter(ledger, run)
    for _ in range(3):
        writer.round()
    it.put(e.TakeTerm(0))
    ((term, machine),) = it.terms
    version, theta = it.writer.committed
    assert (term, machine.version, version) == (2, 5, 5)
    assert digest(theta) == digest(writer.replica.theta) == writer.entries[-1].digest
    assert (it.told, it.replies, it.distributed) == ([], [], [])
    writer.ledger.close()


def test_an_update_that_was_kept_too_late_for_its_entry_goes(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    early, late = writer.records(0)[:2], writer.records(0)[2:]
    writer.ledger.commit_updates(early)
    terms = terms_of(early, writer.settings, 0)
    writer.ledger.commit_updates(late)  # on its way when the deadline came
    entry = Entry(0, terms, writer.head, writer.replica.apply(terms))
    writer.ledger.commit_entry(entry, early, asked=3, overdue=True, products=writer.products(0))
    assert writer.ledger.records(0) == early
    verify_ledger(writer.ledger, writer.mask)
    writer.ledger.close()
