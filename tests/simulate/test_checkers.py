"""Each checker passes a made-up history that is right, and sees each thing that can be wrong with one."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.core.gradip import inner_products
from meerkat_mq.core.path import Displacement, Entry, digest
from meerkat_mq.core.replica import Replica
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.rounds.early_stopping import judgements_of
from meerkat_mq.rounds.policy import terms_of
from meerkat_mq.rounds.records import Judgement, UpdateRecord, Verdict
from meerkat_mq.simulate.checkers import CHECKERS, check
from meerkat_mq.simulate.history import CORRUPT_THETA, History, Injected
from meerkat_mq.wire.messages import Round, Update, Values
from tests.rounds.support import RUN, header, settings, state, status

NODES, ROUNDS = ("n0", "n1"), 4
MASK = toy_mask(4)


def records_of(version: int, scale: float = 1.0) -> tuple[UpdateRecord, ...]:
    return tuple(
        UpdateRecord(version, node, slot, 1, 1, (scale * (1.0 + version + slot / 4),), 1.0)
        for slot, node in enumerate(NODES)
    )


def frame(history: History, version: int, heard: frozenset[int] = frozenset()) -> Round:
    at = replace(header(version), mask=MASK.hash[:8])
    newest = tuple(history.entries[max(version - 2, 0) : version])
    return Round(at, True, 1, 1, 2.0**-10, 1000, asked=frozenset({0, 1}), heard=heard, entries=newest)


def right() -> History:
    """Two nodes, four rounds, one server."""
    history = History(MASK, settings(mask_hash=MASK.hash, count=ROUNDS, measured=True))
    extend(history, ROUNDS)
    history.terms = [(1, "5" * 16)]
    history.states = [(0.0, state())]
    history.finished = True
    return history


def extend(history: History, until: int, scale: float = 1.0) -> None:
    """Let rounds happen, from where the ledger ends."""
    replica = Replica(MASK, run_id=RUN, stream="mk1", digest_every=1)
    for entry in history.entries:
        replica.apply(entry.terms)
    for version in range(len(history.entries), until):
        base = history.entries[-1].digest if history.entries else digest(MASK.theta_0)
        records = records_of(version, scale)
        history.rounds.append((10.0 * version, frame(history, version)))
        for record in records:
            history.saw_update(
                10.0 * version + 1, record.node, Update(header(version), 1, base[:8], 1.0, record.scalars)
            )
        history.rounds.append((10.0 * version + 2, frame(history, version, frozenset({0, 1}))))
        head = history.entries[-1].hash(RUN) if history.entries else MASK.hash
        terms = terms_of(records, history.settings, version)
        history.entries.append(Entry(version, terms, head, replica.apply(terms)))
        history.records.append(records)
        products = inner_products(MASK.g_p, RUN, version, lanes=1, steps=1, stream="mk1")
        history.products.append(products)
        history.judgements.append(judgements_of(version, records, products, history.settings))
        history.entry_terms.append(1)
    history.rounds.append((10.0 * until, frame(history, until)))


def found(history: History) -> list[str]:
    return [name for name, violations in check(history).items() if violations]


def test_nothing_is_found_in_a_history_that_is_right() -> None:
    assert found(right()) == []
    assert len(CHECKERS) == 10


Damage = Callable[[History], None]


def change(at: int, /, **fields: object) -> Damage:
    def damage(history: History) -> None:
        records = list(history.records[at])
        records[0] = replace(records[0], **fields)  # type: ignore[arg-type]
        history.records[at] = tuple(records)

    return damage


def counted_twice(history: History) -> None:
    history.records[2] += (history.records[2][0],)


def cut(history: History, version: int) -> None:
    """The ledger ends there."""
    for kept in (history.entries, history.records, history.products, history.judgements, history.entry_terms):
        del kept[version:]


def lost(history: History) -> None:
    cut(history, ROUNDS - 1)


def rewritten(history: History) -> None:
    cut(history, 2)
    rounds, updates, claims = history.rounds[:], history.updates[:], history.claims[:]
    extend(history, ROUNDS, scale=2.0)
    history.rounds, history.updates, history.claims = rounds, updates, claims


def heard_and_lost(history: History) -> None:
    history.records[1] = history.records[1][:1]


def claimed(history: History) -> None:
    history.saw_status(5.0, "n1", status().model_copy(update={"run": RUN.hex(), "version": 2, "digest": "0" * 32}))


def from_elsewhere(history: History) -> None:
    history.claims.clear()
    history.updates = [
        (time, node, replace(update, base=bytes(8)) if node == "n1" else update)
        for time, node, update in history.updates
    ]


def flagged_before(history: History) -> None:
    """As if a calibration of two steps had flagged the first node."""
    config = EarlyStoppingConfig(by="vpcs").model_copy(update={"calibration_steps": 1})
    history.settings = history.settings.model_copy(update={"local_steps": 2, "early_stopping": config})
    history.judgements[0] = (Judgement(0, "n0", 9.0, 1.0, early_stopped=True),)


def another_product(history: History) -> None:
    history.products[1] = ((1.0,),)


def nothing_measured(history: History) -> None:
    history.products.clear()


def two_servers(history: History) -> None:
    history.states.append((3.0, state(server_id="6" * 16)))


def untaken(history: History) -> None:
    history.entry_terms[-1] = 2


def backwards(history: History) -> None:
    history.terms.append((2, "6" * 16))
    history.entry_terms[1] = 2


def stale(history: History) -> None:
    """An update enters a later entry, which takes none so old."""
    record, *others = history.records[1]
    history.records[1], history.records[3] = tuple(others), (record, *history.records[3])


def with_displacement(history: History) -> None:
    """Entry 2 has a displacement that none of its updates gives."""
    history.entries[2] = replace(history.entries[2], displacement=Displacement(bytes(16), 9))


def without_displacement(history: History) -> None:
    change(2, scalars=(), values=Values(bytes(16), 9, 1))(history)


def acknowledged_and_lost(history: History) -> None:
    """A later round said that the first node was heard in the round before."""
    history.rounds.append((25.0, replace(frame(history, 2), heard_before=((0, 1),))))
    history.records[1] = history.records[1][1:]


def unfinished(history: History) -> None:
    history.finished = False


@pytest.mark.parametrize(
    ("damage", "checker"),
    [
        (counted_twice, "no update applied twice"),
        (change(2, version=1), "no update applied twice"),
        (change(2, version=1), "no update too stale"),
        (change(2, scalars=(1.0,)), "no update applied twice"),
        (stale, "no update too stale"),
        (acknowledged_and_lost, "no committed round lost or changed"),
        (with_displacement, "displacements recomputable"),
        (without_displacement, "displacements recomputable"),
        (change(1, values=Values(bytes(16), 9, 1)), "as many scalars as asked"),
        (lost, "no committed round lost or changed"),
        (rewritten, "no committed round lost or changed"),
        (heard_and_lost, "no committed round lost or changed"),
        (claimed, "theta is the replay of the ledger"),
        (from_elsewhere, "theta is the replay of the ledger"),
        (change(1, scalars=(9.0,)), "coefficients recomputable"),
        (change(1, verdict=Verdict.OUTLIER), "coefficients recomputable"),
        (change(1, scalars=(float("nan"),)), "coefficients recomputable"),
        (change(1, scalars=(2.0, 2.0)), "as many scalars as asked"),
        (flagged_before, "as many scalars as asked"),
        (flagged_before, "judgements recomputable"),
        (another_product, "judgements recomputable"),
        (nothing_measured, "judgements recomputable"),
        (change(1, verdict=Verdict.EARLY_STOPPED), "judgements recomputable"),
        (two_servers, "one writer a term"),
        (untaken, "one writer a term"),
        (backwards, "one writer a term"),
        (unfinished, "a live quorum finishes"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(damage: Damage, checker: str) -> None:
    history = right()
    damage(history)
    assert checker in found(history)


def broken_chain(history: History) -> None:
    history.entries[1] = replace(history.entries[1], previous=bytes(16))


def wrong_digest(history: History) -> None:
    history.entries[1] = replace(history.entries[1], digest=bytes(15) + b"x")


@pytest.mark.parametrize("damage", [broken_chain, wrong_digest])
def test_entries_that_are_no_chain_or_lead_elsewhere_are_found(damage: Damage) -> None:
    history = right()
    damage(history)
    assert "theta is the replay of the ledger" in found(history)


def test_what_a_restore_undid_may_differ_and_nothing_else() -> None:
    history = right()
    rewritten(history)
    history.backups.append((100.0, 2))
    assert found(history) == []
    history.backups[:] = [(100.0, 3)]
    assert "no committed round lost or changed" in found(history)
    history.backups[:] = [(15.0, 2)]
    assert "no committed round lost or changed" in found(history)


def test_a_node_whose_theta_was_corrupted_may_claim_what_it_likes_while_that_lasts() -> None:
    history = right()
    claimed(history)
    history.faults.append(Injected(CORRUPT_THETA, "n1", 4.0, 6.0))
    assert found(history) == []
    history.faults[-1] = Injected(CORRUPT_THETA, "n1", 5.5, 6.0)
    assert found(history) == ["theta is the replay of the ledger"]


def test_frames_of_another_run_say_nothing_of_this_one() -> None:
    history = right()
    other = replace(header(900), run=1)
    history.rounds.append((1.0, replace(history.rounds[0][1], header=other)))
    history.saw_update(1.0, "n0", Update(other, 1, bytes(8), 1.0, (1.0,)))
    assert found(history) == []
