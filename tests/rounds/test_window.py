"""The window: which versions an update may be from, and what waits for the next entry."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from meerkat_mq.core.path import NO_DIGEST
from meerkat_mq.rounds.records import UpdateRecord
from meerkat_mq.rounds.window import Window
from tests.rounds.support import THETA_0, base_after, chain

ENTRIES = chain(20)


def record(node: str, slot: int, version: int) -> UpdateRecord:
    return UpdateRecord(version, node, slot, 1, 1, (1.0,), 1.0)


def window(head: int = 0, max_staleness: int = 2, *updates: UpdateRecord) -> Window:
    bases = {version: base_after(version - 1) if version else THETA_0 for version in range(head + 1)}
    return Window(head, max_staleness, bases, updates)


def advance(found: Window, versions: int = 1) -> None:
    for _ in range(versions):
        found.advance(ENTRIES[found.head])


@given(st.integers(0, 6), st.integers(0, 15))
def test_it_spans_the_head_and_so_many_versions_before(max_staleness: int, head: int) -> None:
    found = window(max_staleness=max_staleness)
    advance(found, head)
    known = [version for version in range(head + 3) if found.base(version) is not None]
    assert known == list(range(max(0, head - max_staleness), head + 1))
    assert [version for version in known if found.why_late("a", version, head) is None] == known
    assert [version for version in range(head + 3) if found.why_late("a", version, head) == "early"] == [
        head + 1,
        head + 2,
    ]
    assert found.why_late("a", known[0] - 1, head) == "late"


def test_the_base_is_the_newest_due_digest() -> None:
    found = window()
    for entry in ENTRIES[:4]:
        found.advance(replace(entry, digest=NO_DIGEST) if entry.version % 2 == 0 else entry)
    assert [found.base(version) for version in (2, 3, 4)] == [base_after(1), base_after(1), base_after(3)]


def test_a_node_sends_once_from_a_version_and_never_from_an_older_one() -> None:
    found = window()
    advance(found, 2)
    found.take("a", 1)
    assert [found.why_late("a", version, 2) for version in (0, 1, 2)] == ["duplicate", "duplicate", None]
    assert found.why_late("b", 0, 2) is None


def test_a_displacement_on_its_way_is_not_asked_for_twice_and_may_be_again_when_it_did_not_come() -> None:
    found = window()
    found.fetch("a", 0)
    assert found.why_late("a", 0, 0) == "duplicate"
    assert not found.fetched("a", 1)
    assert found.fetched("a", 0)
    assert found.why_late("a", 0, 0) is None
    assert not found.fetched("a", 0)


def test_what_waits_enters_the_next_entry_once_unless_it_is_too_old_by_then() -> None:
    found = window(max_staleness=1)
    advance(found, 2)
    for waiting in (record("a", 0, 1), record("b", 1, 2)):
        found.wait(waiting)
    advance(found)
    assert list(found.open().values()) == [record("b", 1, 2)]
    assert found.open() == {}


def test_on_resume_updates_wait_and_are_acknowledged_and_so_is_what_entries_hold() -> None:
    found = window(5, 3, record("a", 0, 4), record("b", 1, 5))
    found.resume("a", 0, 2)
    found.resume("c", 2, 3)
    assert found.acknowledged == {0: 4, 1: 5, 2: 3}
    assert found.why_late("a", 4, 5) == found.why_late("c", 3, 5) == "duplicate"
    assert found.why_late("a", 5, 5) is None
    assert list(found.open()) == [(4, "a"), (5, "b")]
