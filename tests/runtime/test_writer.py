"""The ledger writer: what is committed when, what nobody hears of, and what a disk that fails for a while changes."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meerkat_mq.config import ServerConfig, ServerValuesConfig
from meerkat_mq.core.path import Coefficient, Entry, short_hash
from meerkat_mq.core.values import quantised
from meerkat_mq.errors import AnotherServer, LedgerError, LedgerFailing, LedgerUnavailable, RunError
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.records import Share, UpdateRecord, Verdict
from meerkat_mq.runtime.disk import FAILING_S
from meerkat_mq.runtime.writer import GROUP_S, TERM_PAUSE_S, WANTS, KeepMetrics, KeepValues
from meerkat_mq.server.run import prepare_run
from meerkat_mq.wire.messages import Chunk, Header, Update, Values, Want
from meerkat_mq.wire.values import decode_values, encode_values
from tests.runtime.one_writer import CountingLedger, Frame, OneWriter

FULL = LedgerUnavailable("ledger.sqlite", "cannot be written just now")
BROKEN = LedgerFailing("ledger.sqlite", "the disk gives errors")
TERMS = (Coefficient(0, 0, 0.5),)


def record(slot: int) -> UpdateRecord:
    return UpdateRecord(0, f"node-{slot}", slot, 1, 1, (0.5,), 0.5)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[CountingLedger]:
    with closing(CountingLedger.open(tmp_path / LEDGER_FILE)) as opened:
        yield opened


@pytest.fixture
def new(ledger: CountingLedger) -> OneWriter:
    """Not in charge of anything yet."""
    values = ServerValuesConfig(accept=True, codec="int8")
    folder = ledger.path.parent
    config = ServerConfig(federation="f", state_dir=folder, engine="toy", toy_weights=10, values=values)
    return OneWriter(ledger, prepare_run(config))


@pytest.fixture
def it(new: OneWriter) -> OneWriter:
    """In charge, with three slots given."""
    new.put(e.TakeTerm(0))
    new.put(*(e.CommitSlot(f"node-{slot}", slot) for slot in range(3)))
    new.told.clear()
    return new


def entry(*terms: Coefficient) -> Entry:
    return Entry(0, terms, bytes(16), bytes(16))


def kinds(it: OneWriter) -> list[type[e.ServerEvent]]:
    return [type(event) for event in it.told]


# --- what is committed together, and told when ---


def test_updates_that_come_while_the_ledger_is_busy_are_one_group_and_heard_only_then(
    it: OneWriter, ledger: CountingLedger
) -> None:
    it.worker.held = True
    it.writer.put(e.CommitUpdate(record(0), last=True))
    it.clock.settle()
    for slot in (1, 2):
        it.writer.put(e.CommitUpdate(record(slot), last=True))
    it.writer.put(KeepMetrics(0, {"loss": 2.0}))
    it.writer.put(e.ApplyTerms(0, TERMS))
    it.clock.go(1.0)
    assert (it.told, it.worker.waiting) == ([], 1)
    it.worker.free()
    assert ledger.sizes == [1, 2]
    assert ledger.open_updates() == tuple(map(record, range(3)))
    assert ledger.metrics() == {0: {"loss": 2.0}}
    assert kinds(it) == [e.UpdatesCommitted, e.UpdatesCommitted, e.TermsApplied]
    assert it.replica.version == 1
    assert it.writer.committed[0] == 0


def test_nobody_is_told_before_the_commit_is_back(it: OneWriter, ledger: CountingLedger) -> None:
    it.put(e.ApplyTerms(0, TERMS))
    it.told.clear()
    before = it.writer.committed
    it.worker.held = True
    it.writer.put(e.CommitSlot("node-3", 3))
    it.clock.settle()
    it.writer.put(e.CommitUpdate(record(0), last=True))
    it.writer.put(e.CommitEntry(entry(*TERMS), (), 3, overdue=False))
    it.clock.go(1.0)
    assert (it.told, it.writer.committed[0]) == ([], before[0])
    it.worker.do()
    assert (kinds(it), "node-3" in ledger.slots()) == ([e.SlotCommitted], True)
    assert (ledger.version, it.writer.committed[0]) == (0, 0)
    it.worker.do()
    assert kinds(it) == [e.SlotCommitted, e.UpdatesCommitted, e.EntryCommitted]
    assert (ledger.version, it.writer.committed[0]) == (1, 1)


def test_updates_wait_for_the_last_of_their_round_but_not_for_long(it: OneWriter, ledger: CountingLedger) -> None:
    began = it.clock.now()
    for slot in range(3):
        it.clock.settle()
        it.writer.put(e.CommitUpdate(record(slot), last=slot == 2))
    it.clock.settle()
    assert (ledger.sizes, kinds(it), it.clock.now()) == ([3], [e.UpdatesCommitted], began)
    it.told.clear()
    it.writer.put(e.CommitUpdate(replace(record(0), version=1), last=False))
    it.clock.until(lambda: it.told)
    assert it.clock.now() == pytest.approx(began + GROUP_S)


@pytest.mark.parametrize("news", [KeepMetrics(0, {"loss": 2.0}), e.CommitUpdate(record(1), last=False)])
def test_what_can_wait_holds_up_nothing_that_cannot(it: OneWriter, news: KeepMetrics | e.CommitUpdate) -> None:
    it.worker.held = True
    it.writer.put(e.CommitUpdate(record(0), last=True))
    it.clock.settle()
    it.writer.put(e.ApplyTerms(0, TERMS))
    it.writer.put(news)  # while the ledger is busy
    it.worker.free()
    assert e.TermsApplied in kinds(it)


def test_wants_do_not_hold_up_a_round(it: OneWriter) -> None:
    it.put(e.ApplyTerms(0, TERMS))
    it.put(e.CommitEntry(entry(*TERMS), (), 3, overdue=False))
    it.told.clear()
    for number in range(2 * WANTS):
        it.writer.put(e.SendEntries(f"w{number}", 0))
        it.writer.put(e.SendEntries("again", 0))
    it.writer.put(e.CommitUpdate(replace(record(0), version=1), last=True))
    it.clock.settle()
    assert kinds(it) == [e.UpdatesCommitted]
    assert it.replied_before[-1] <= 1
    assert len(it.replies) == WANTS
    assert len({node for node, _ in it.replies}) == WANTS


def test_between_two_wants_a_group_is_committed(it: OneWriter) -> None:
    it.put(e.ApplyTerms(0, TERMS), e.CommitEntry(entry(*TERMS), (), 3, overdue=False))
    it.told.clear()
    it.replied_before.clear()
    it.worker.held = True
    for number in range(3):
        it.writer.put(e.SendEntries(f"w{number}", 0))
    it.clock.settle()
    it.writer.put(e.CommitUpdate(replace(record(0), version=1), last=True))
    it.worker.do()  # the want that was being answered
    it.writer.put(e.CommitUpdate(replace(record(1), version=1), last=True))
    it.worker.free()
    assert it.replied_before == [1, 2]
    assert len(it.replies) == 3


def test_whoever_asks_again_and_again_does_not_keep_a_server_from_ending(
    it: OneWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reply(node: str, frame: Frame) -> bool:
        asked.append(node)
        if len(asked) < 100:
            it.writer.put(e.SendEntries(node, 0))
        return True

    asked: list[str] = []
    it.put(e.ApplyTerms(0, TERMS), e.CommitEntry(entry(*TERMS), (), 3, False))
    monkeypatch.setattr(it, "reply", reply)
    it.writer.put(e.SendEntries("hostile", 0))
    it.clock.until(lambda: asked)
    it.writer.put(KeepMetrics(0, {"loss": 2.0}))
    asked_when_idle: list[int] = []
    it.writer.when_idle(lambda: asked_when_idle.append(len(asked)))
    it.clock.settle()
    assert (len(asked), it.ledger.metrics()) == (100, {0: {"loss": 2.0}})
    assert asked_when_idle[0] < 10


def test_an_answer_that_finds_no_room_is_not_gone_on_with(it: OneWriter) -> None:
    it.put(e.ApplyTerms(0, TERMS), e.CommitEntry(entry(*TERMS), (), 3, overdue=False))
    it.full = True
    it.put(e.SendEntries("node-0", 0))
    it.full = False
    it.put(e.SendEntries("node-1", 0))
    assert [node for node, _ in it.replies] == ["node-1"]


# --- terms ---


def test_a_new_term_takes_theta_back_to_what_is_committed_and_leaves_the_old_machines_work(
    it: OneWriter, ledger: CountingLedger
) -> None:
    before = it.writer.committed
    it.put(
        e.CommitUpdate(record(0), last=True),
        e.ApplyTerms(0, TERMS),
        e.TakeTerm(40),
        e.ApplyTerms(0, TERMS),
    )
    term, machine = it.terms[-1]
    assert (term, machine.version) == (41, 0)
    assert it.replica.version == 0
    assert (it.replica.theta == before[1]).all()
    assert [term.term for term in ledger.terms()] == [1, 41]
    assert ledger.open_updates() == (record(0),)
    assert kinds(it) == [e.UpdatesCommitted, e.TermsApplied]


def test_terms_have_a_pause_between_them(it: OneWriter, ledger: CountingLedger) -> None:
    began = it.clock.now()
    it.put(e.TakeTerm(10))
    it.put(e.TakeTerm(20))
    assert [term for term, _ in it.terms] == [1, 11, 21]
    assert it.clock.now() == began + 2 * TERM_PAUSE_S


def test_another_servers_term_in_the_ledger_ends_this_one(it: OneWriter, ledger: CountingLedger) -> None:
    with closing(Ledger.open(ledger.path)) as other:
        other.take_term(0, "d" * 16, "there")
        with pytest.raises(AnotherServer):
            it.put(e.CommitUpdate(record(0), last=True))
        assert (it.told, it.outranked_times) == ([], 1)
        assert other.open_updates() == ()


# --- a disk that cannot take it ---


def test_another_servers_term_is_found_at_a_snapshot_too(it: OneWriter, ledger: CountingLedger) -> None:
    with closing(Ledger.open(ledger.path)) as other:
        other.take_term(0, "d" * 16, "there")
    with pytest.raises(AnotherServer):
        it.put(e.KeepSnapshot(0, bytes(16)))
    assert it.outranked_times == 1


def test_a_commit_that_failed_is_tried_again_from_the_same_place(it: OneWriter, ledger: CountingLedger) -> None:
    began = it.clock.now()
    it.worker.fails.extend([FULL, FULL, FULL])
    it.writer.put(e.CommitUpdate(record(0), last=True))
    it.clock.settle()
    it.writer.put(e.CommitUpdate(record(1), last=True))
    it.writer.put(e.ApplyTerms(0, TERMS))
    it.clock.go(0.69)
    assert (it.told, ledger.sizes, it.replica.version) == ([], [], 0)
    it.clock.until(lambda: len(it.told) == 3)
    assert it.clock.now() == pytest.approx(began + 0.1 + 0.2 + 0.4)
    assert kinds(it) == [e.UpdatesCommitted, e.UpdatesCommitted, e.TermsApplied]
    assert (ledger.sizes, it.replica.version) == ([1, 1], 1)
    assert ledger.open_updates() == (record(0), record(1))


def test_a_commit_that_failed_half_way_leaves_no_trace(
    it: OneWriter, ledger: CountingLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise FULL

    it.put(e.ApplyTerms(0, TERMS))
    it.told.clear()
    it.writer.put(KeepMetrics(7, {"loss": 1.0}))
    for order in (e.CommitSlot("node-3", 3), e.CommitEntry(entry(*TERMS), (), 3, overdue=False)):
        it.writer.put(order)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "commit_entry", full)
        it.clock.go(10.0)
        assert (it.told, "node-3" in ledger.slots(), ledger.metrics(), ledger.version) == ([], False, {}, 0)
    it.clock.until(lambda: it.told)
    assert kinds(it) == [e.SlotCommitted, e.EntryCommitted]
    assert ("node-3" in ledger.slots(), ledger.version) == (True, 1)


def test_a_disk_that_is_full_is_waited_for_and_one_that_is_broken_is_not(it: OneWriter) -> None:
    began = it.clock.now()
    it.worker.fails.extend([FULL] * 1000)
    it.writer.put(e.CommitUpdate(record(0), last=True))
    it.clock.go(1000.0)
    assert it.told == []
    it.worker.fails.clear()
    it.clock.until(lambda: it.told, within_s=5.0)

    began = it.clock.now()
    it.worker.fails.extend([BROKEN] * 1000)
    it.writer.put(e.CommitUpdate(record(1), last=True))
    with pytest.raises(LedgerFailing):
        it.clock.go(1000.0)
    assert FAILING_S < it.clock.now() - began <= FAILING_S + 5.0
    assert kinds(it) == [e.UpdatesCommitted]


def test_what_cannot_be_read_is_answered_by_nobody_and_asked_again(it: OneWriter) -> None:
    it.put(e.ApplyTerms(0, TERMS), e.CommitEntry(entry(*TERMS), (), 3, overdue=False))
    it.worker.fails.append(FULL)
    it.put(e.SendEntries("node-0", 0), e.SendEntries("node-1", 0))
    assert [node for node, _ in it.replies] == ["node-1"]
    it.put(e.SendEntries("node-0", 0))
    assert [node for node, _ in it.replies] == ["node-1", "node-0"]


def test_what_cannot_be_committed_is_told_to_nobody(
    new: OneWriter, ledger: CountingLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise LedgerError("ledger.sqlite", "there is no space left")

    new.put(e.TakeTerm(0))
    monkeypatch.setattr(Ledger, "commit_entry", full)
    with pytest.raises(LedgerError):
        new.put(e.CommitSlot("node-0", 0), e.CommitEntry(entry(), (), 1, overdue=False))
    assert new.told == []
    assert ledger.slots() == {}


def test_what_ruins_theta_ends_the_server_before_there_is_an_entry(new: OneWriter, ledger: CountingLedger) -> None:
    before = new.replica.theta.tobytes()
    new.put(e.TakeTerm(0))
    with pytest.raises(RunError, match=r"theta: is not finite after a step of coefficient 3e\+38; lower the"):
        new.put(e.ApplyTerms(0, (Coefficient(0, 0, 3e38), Coefficient(0, 0, 3e38)), ()))
    assert (new.told, ledger.version, new.replica.theta.tobytes()) == ([], 0, before)


# --- displacements ---


def values_update(number: float) -> tuple[Update, bytes]:
    """A values node's, and what it announces."""
    blob = encode_values(np.arange(10, dtype=np.float32) * np.float32(number), "float32")
    header = Header.of(bytes(16), 1, 0, bytes(16))
    return Update(header, 1, bytes(8), 0.5, (), values=Values(short_hash(blob), len(blob), 5)), blob


def keep(it: OneWriter, *numbers: float) -> tuple[Share, ...]:
    """Values nodes' updates come and are committed, by slot; equal shares of them."""
    names = []
    for slot, number in enumerate(numbers):
        update, blob = values_update(number)
        assert update.values is not None
        it.put(KeepValues(f"node-{slot}", update, blob, Verdict.ACCEPTED))
        it.put(e.CommitUpdate(replace(record(slot), scalars=(), values=update.values), last=True))
        names.append(update.values.blob)
    return tuple(Share(name, 1 / len(names)) for name in names)


def test_a_displacement_is_kept_before_the_machine_hears_that_it_came(it: OneWriter, ledger: CountingLedger) -> None:
    update, blob = values_update(1.0)
    it.worker.held = True
    it.writer.put(KeepValues("node-0", update, blob, Verdict.TOO_LARGE))
    it.clock.go(1.0)
    assert (it.told, ledger.blob(short_hash(blob))) == ([], None)
    it.worker.free()
    (came,) = it.told
    assert isinstance(came, e.ValuesFetched)
    assert (came.node, came.update, came.verdict) == ("node-0", update, Verdict.TOO_LARGE)
    assert ledger.blob(short_hash(blob)) == blob


def test_the_mean_is_encoded_once_kept_applied_and_handed_out_after_its_entry(
    it: OneWriter, ledger: CountingLedger
) -> None:
    theta = it.replica.theta.copy()
    shares = keep(it, 0.5, 1.25)
    it.put(e.ApplyTerms(0, (), shares))
    applied = it.told[-1]
    assert isinstance(applied, e.TermsApplied)
    assert applied.displacement is not None
    blob = ledger.blob(applied.displacement.blob)
    assert blob is not None
    assert len(blob) == applied.displacement.size
    mean = quantised((np.arange(10, dtype=np.float32) * np.float32(0.875)), "int8")
    assert decode_values(blob, applied.displacement.blob, 10).tobytes() == mean.tobytes()
    assert it.replica.theta.tobytes() == (theta + mean).tobytes()
    assert (it.distributed, ledger.displacement(applied.displacement.blob)) == ([], None)

    records = ledger.open_updates()
    made = Entry(0, (), it.run.mask.hash, applied.digest, applied.displacement)
    it.put(e.CommitEntry(made, records, 3, overdue=False))
    assert isinstance(it.told[-1], e.EntryCommitted)
    assert it.distributed == [blob]
    for name in (applied.displacement.blob, shares[0].blob):
        it.put(e.SendChunks("node-9", Want(it.header(), 1, blob=name, chunks=(7, 0, 0))))
    ((node, chunk),) = it.replies  # what a node sent is nobody else's business
    assert isinstance(chunk, Chunk)
    assert (node, chunk.data, chunk.count) == ("node-9", blob, 1)
