"""Getting displacements from nodes: chunk by chunk, one a node, in bounded memory; what is none is dropped."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from meerkat_mq.core.path import short_hash
from meerkat_mq.errors import BadValue
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.records import Verdict
from meerkat_mq.runtime import fetches as module
from meerkat_mq.runtime.fetches import LONGEST_S, Fetches
from meerkat_mq.runtime.writer import KeepValues
from meerkat_mq.wire.arrays import encode_array, split
from meerkat_mq.wire.messages import Header, Update, Values, Want
from meerkat_mq.wire.values import encode_values, largest_blob
from tests.runtime.ports import VirtualClock, Worker

WEIGHTS = 200_000
HEADER = Header.of(bytes(16), 1, 0, bytes(16))


def blob_of(number: float, weights: int = WEIGHTS) -> bytes:
    drawn = np.random.default_rng(int(number)).normal(0, 1, weights)
    return encode_values((number * drawn).astype(np.float32), "float32")


TOO_LARGE = encode_values(np.full(WEIGHTS, -1.5 * 2.0**127, dtype=np.float32), "float32")
TOO_FAR = encode_values(np.linspace(0, -1000.1, WEIGHTS, dtype=np.float32), "float32")


def order(node: str, blob: bytes, *, loss: float = 0.5, size: int | None = None, version: int = 0) -> e.FetchValues:
    header = replace(HEADER, version=version)
    values = Values(short_hash(blob), len(blob) if size is None else size, 5)
    return e.FetchValues(node, Update(header, 77, bytes(8), loss, (), values=values))


def missed(event: e.ServerEvent) -> bool:
    """Whether a displacement did not come."""
    return isinstance(event, e.ValuesFetched) and event.verdict is None


class Asking:
    """Fetches, and what they say.

    Attributes:
        told: what the machine hears.
        kept: what came.
        wants: to whom, and what.
        is_full: whether the ledger's disk takes nothing.
    """

    def __init__(self) -> None:
        self.told: list[e.ServerEvent] = []
        self.kept: list[KeepValues] = []
        self.wants: list[tuple[str, Want]] = []
        self.clock = VirtualClock()
        self.worker = Worker(self.clock)
        self.is_full = False
        self.fetches = Fetches(WEIGHTS, self, self.keep, compute=self.worker, clock=self.clock)

    def keep(self, found: KeepValues) -> None:
        self.kept.append(found)
        if not self.is_full:
            self.clock.at(self.clock.now(), partial(found.kept, None))

    def handle(self, event: e.ServerEvent) -> None:
        self.told.append(event)

    def reply(self, node: str, frame: Want) -> bool:
        self.wants.append((node, frame))
        return True

    def header(self) -> Header:
        return HEADER

    @property
    def asked(self) -> list[str]:
        """The nodes, in the order in which they were asked."""
        return [node for node, _ in self.wants]

    def put(self, order: e.FetchValues) -> None:
        self.fetches.put(order)
        self.clock.settle()

    def wanted(self, node: str, times: int = 1) -> Want:
        """Wait for the n-th want to a node."""
        self.clock.until(lambda: self.asked.count(node) >= times)
        return [want for name, want in self.wants if name == node][times - 1]

    def send(self, node: str, blob: bytes, chunks: tuple[int, ...], name: bytes | None = None) -> None:
        for chunk in split(HEADER, name or short_hash(blob), blob):
            if chunk.index in chunks:
                self.fetches.add(node, chunk)
        self.clock.settle()

    def answer(self, node: str, blob: bytes, name: bytes | None = None) -> None:
        """As a node does that has the blob."""
        self.send(node, blob, self.wanted(node).chunks, name)


@pytest.fixture
def asking() -> Asking:
    return Asking()


def test_what_did_not_come_is_asked_for_again(asking: Asking) -> None:
    blob = blob_of(1)
    wanted = order("a", blob)
    asking.put(wanted)
    want = asking.wanted("a")
    count = -(-len(blob) // 2**16)
    assert count > 4
    assert (want.boot, want.blob, want.chunks) == (77, short_hash(blob), tuple(range(count)))
    asking.send("a", blob, (0, 2, 3))
    again = asking.wanted("a", 2)
    assert again.chunks == (count - 1,)
    asking.send("a", blob, again.chunks)
    rest = asking.wanted("a", 3)
    assert rest.chunks == (1, *range(4, count - 1))
    asking.send("a", blob, rest.chunks)
    assert asking.kept == [KeepValues("a", wanted.update, blob, Verdict.ACCEPTED)]
    with pytest.raises(BadValue, match="was not asked for"):
        asking.send("a", blob, (0,))


@pytest.mark.parametrize(
    ("blob", "loss", "verdict"),
    [
        (blob_of(1), math.nan, Verdict.NOT_FINITE),
        (TOO_LARGE, 0.5, Verdict.TOO_LARGE),
        (TOO_FAR, 0.5, Verdict.TOO_LARGE),
    ],
)
def test_what_no_theta_takes_is_kept_as_refused(asking: Asking, blob: bytes, loss: float, verdict: Verdict) -> None:
    asking.put(order("a", blob, loss=loss))
    asking.answer("a", blob)
    assert [kept.verdict for kept in asking.kept] == [verdict]


def nan() -> bytes:
    """An encoding of what no codec encodes."""
    return blob_of(1)[:13] + encode_array(np.full(WEIGHTS, math.nan, dtype=np.float32))


@pytest.mark.parametrize(
    "blob", [blob_of(1)[:-1], blob_of(1, WEIGHTS - 1), b"x" * 100, nan()], ids=["cut", "too few", "noise", "nan"]
)
def test_what_is_no_displacement_is_missed(asking: Asking, blob: bytes) -> None:
    hostile = order("a", blob)
    asking.put(hostile)
    asking.answer("a", blob)
    assert asking.told == [e.ValuesFetched(0.0, "a", hostile.update, None)]
    assert asking.kept == []


def test_chunks_that_are_not_of_the_hash_are_missed(asking: Asking) -> None:
    blob, other = blob_of(1), bytes(len(blob_of(1)))
    asking.put(order("a", blob))
    asking.answer("a", other, name=short_hash(blob))
    assert [missed(event) for event in asking.told] == [True]


def test_nothing_is_asked_where_more_is_announced_than_a_displacement_can_have(asking: Asking) -> None:
    asking.put(order("a", b"x", size=largest_blob(WEIGHTS) + 1))
    assert [missed(event) for event in asking.told] == [True]
    assert asking.wants == []


def test_nobody_hears_of_it_while_it_is_being_ordered(asking: Asking) -> None:
    """The machine that orders it has something else to do first."""
    asking.fetches.put(order("a", b"x", size=largest_blob(WEIGHTS) + 1))
    assert (asking.told, asking.wants) == ([], [])


def test_a_silent_node_is_missed_and_another_ones_chunk_is_not_taken(asking: Asking) -> None:
    blob = blob_of(1)
    asking.put(order("a", blob))
    asking.wanted("a")
    with pytest.raises(BadValue, match="was not asked for"):
        asking.send("b", blob, (0,))
    with pytest.raises(BadValue, match="of another blob"):
        asking.send("a", blob_of(2), (0,))
    asking.clock.until(lambda: asking.told)
    assert [missed(event) for event in asking.told] == [True]
    assert len(asking.wants) == module.SILENCES


def test_a_node_that_is_never_silent_holds_up_the_others_for_so_long_only(asking: Asking) -> None:
    slow, other = order("a", blob_of(1)), blob_of(2)
    chunks = split(HEADER, short_hash(blob_of(1)), blob_of(1))
    asking.put(slow)
    for chunk in chunks[:-1]:
        assert asking.told == []
        asking.fetches.add("a", chunk)
        asking.clock.go(LONGEST_S / (len(chunks) - 1))
    assert asking.told == [e.ValuesFetched(LONGEST_S, "a", slow.update, None)]
    assert asking.kept == []
    with pytest.raises(BadValue, match="was not asked for"):
        asking.fetches.add("a", chunks[-1])

    asking.put(order("b", other))
    asking.answer("b", other)
    assert asking.kept[0].blob == other


def test_the_time_of_a_fetch_begins_when_there_is_room_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 1)
    monkeypatch.setattr(module, "LONGEST_S", 2.0)  # less than a silence
    asking = Asking()
    for number, node in enumerate("abc", 1):
        asking.put(order(node, blob_of(number)))
    asking.clock.until(lambda: len(asking.told) == 3)
    assert asking.asked == ["a", "b", "c"]
    assert [event.now for event in asking.told] == [2.0, 4.0, 6.0]


def test_no_displacement_is_looked_at_by_whoever_brings_its_chunks(asking: Asking) -> None:
    asking.worker.held = True
    blob = blob_of(1)
    asking.put(order("a", blob))
    asking.answer("a", blob)
    assert (asking.kept, asking.worker.waiting) == ([], 1)
    asking.worker.do()
    assert [kept.verdict for kept in asking.kept] == [Verdict.ACCEPTED]


def test_of_a_node_the_newest_counts(asking: Asking) -> None:
    old, new = blob_of(1), blob_of(2)
    asking.put(order("a", old))
    asking.wanted("a")
    asking.put(order("a", new, version=1))
    want = asking.wanted("a", 2)
    assert want.blob == short_hash(new)
    asking.send("a", new, want.chunks)
    assert [kept.blob for kept in asking.kept] == [new]
    asking.clock.go(2 * LONGEST_S)
    assert asking.told == []


def test_of_a_node_the_newest_counts_although_the_other_one_is_being_decoded(asking: Asking) -> None:
    old, new = blob_of(1), blob_of(2)
    asking.worker.held = True
    asking.put(order("a", old))
    asking.answer("a", old)
    asking.put(order("a", new, version=1))
    asking.worker.free()
    asking.send("a", new, asking.wanted("a", 2).chunks)
    assert [kept.blob for kept in asking.kept] == [new]
    assert asking.told == []


def test_so_many_at_once_and_a_new_term_forgets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 2)
    asking = Asking()
    blobs = {node: blob_of(number) for number, node in enumerate("abcd", 1)}
    for node, blob in blobs.items():
        asking.put(order(node, blob))
    assert asking.asked == ["a", "b"]
    asking.answer("a", blobs["a"])
    assert asking.asked == ["a", "b", "c"]
    asking.fetches.forget()
    with pytest.raises(BadValue, match="was not asked for"):
        asking.send("b", blobs["b"], (0,))
    asking.put(order("d", blobs["d"]))
    asking.answer("d", blobs["d"])
    assert [kept.node for kept in asking.kept] == ["a", "d"]
    asking.clock.go(2 * LONGEST_S)
    assert asking.told == []


def test_what_the_disk_does_not_take_yet_takes_up_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 1)
    asking = Asking()
    asking.is_full = True
    blobs = {node: blob_of(number) for number, node in enumerate("ab", 1)}
    for node, blob in blobs.items():
        asking.put(order(node, blob))
    asking.answer("a", blobs["a"])
    assert ([found.node for found in asking.kept], asking.asked) == (["a"], ["a"])
    asking.kept[0].kept(None)
    asking.clock.settle()
    assert asking.asked == ["a", "b"]


def test_what_is_given_up_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 1)
    asking = Asking()
    old, new, other = blob_of(1), blob_of(2), blob_of(3)
    asking.put(order("a", old))
    asking.put(order("b", other))
    asking.put(order("a", new, version=1))
    assert asking.asked == ["a", "b"]
    asking.answer("b", other)
    assert asking.asked == ["a", "b", "a"]


@pytest.mark.parametrize(("room", "at_once"), [(3 * largest_blob(WEIGHTS) + 1, 3), (1, 1)])
def test_memory_bounds_how_many(monkeypatch: pytest.MonkeyPatch, room: int, at_once: int) -> None:
    monkeypatch.setattr(module, "MEMORY_BYTES", room)
    asking = Asking()
    for number, node in enumerate("abcde", 1):
        asking.put(order(node, blob_of(number)))
    assert asking.asked == list("abcde")[:at_once]
