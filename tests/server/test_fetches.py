"""Getting displacements from nodes: chunk by chunk, one a node, in bounded memory; what is none is dropped."""

import asyncio
import contextlib
import math
import threading
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.path import short_hash
from meerkat_mq.errors import BadValue
from meerkat_mq.ledger.displacement import verdict_on
from meerkat_mq.mqtt import blob_fetch
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.records import Verdict
from meerkat_mq.rounds.server import ServerMachine
from meerkat_mq.server import fetches as module
from meerkat_mq.server.fetches import Fetches
from meerkat_mq.server.scribe import KeepValues
from meerkat_mq.wire.arrays import encode_array, split
from meerkat_mq.wire.messages import Chunk, Entries, Header, Offer, Update, Values, Want
from meerkat_mq.wire.values import encode_values, largest_blob
from tests.support.waiting import until

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


class Desk:
    """Keeps what the fetches say; `answers` holds what nodes would send."""

    def __init__(self) -> None:
        self.told: list[e.ServerEvent] = []
        self.kept: list[KeepValues] = []
        self.wants: list[tuple[str, Want]] = []

    def handle(self, event: e.ServerEvent) -> None:
        self.told.append(event)

    def reply(self, node: str, frame: Entries | Offer | Chunk | Want) -> None:
        assert isinstance(frame, Want)
        self.wants.append((node, frame))

    def distribute(self, blob: bytes) -> None:
        raise AssertionError

    def header(self) -> Header:
        return HEADER

    def took_term(self, term: int, machine: ServerMachine) -> None:
        raise AssertionError


class Office:
    def __init__(self) -> None:
        self.desk = Desk()
        self.fetches = Fetches(WEIGHTS, self.desk, self.desk.kept.append)

    async def wanted(self, node: str, times: int = 1) -> Want:
        """Wait for the n-th want to a node."""
        await until(lambda: sum(name == node for name, _ in self.desk.wants) >= times)
        return [want for name, want in self.desk.wants if name == node][times - 1]

    def send(self, node: str, blob: bytes, chunks: tuple[int, ...], name: bytes | None = None) -> None:
        for chunk in split(HEADER, name or short_hash(blob), blob):
            if chunk.index in chunks:
                self.fetches.add(node, chunk)


@pytest.fixture
async def office(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Office]:
    monkeypatch.setattr(blob_fetch, "PATIENCE_S", 0.05)
    made = Office()
    task = asyncio.create_task(made.fetches.run())
    yield made
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_what_did_not_come_is_asked_for_again(office: Office) -> None:
    blob = blob_of(1)
    wanted = order("a", blob)
    office.fetches.put(wanted)
    want = await office.wanted("a")
    count = -(-len(blob) // 2**16)
    assert count > 4
    assert (want.boot, want.blob, want.chunks) == (77, short_hash(blob), tuple(range(count)))
    office.send("a", blob, (0, 2, 3))
    again = await office.wanted("a", 2)
    assert again.chunks == (count - 1,)
    office.send("a", blob, again.chunks)
    rest = await office.wanted("a", 3)
    assert rest.chunks == (1, *range(4, count - 1))
    office.send("a", blob, rest.chunks)
    await until(lambda: office.desk.kept)
    assert office.desk.kept == [KeepValues("a", wanted.update, blob, Verdict.ACCEPTED)]
    with pytest.raises(BadValue, match="was not asked for"):
        office.send("a", blob, (0,))


@pytest.mark.parametrize(
    ("blob", "loss", "verdict"),
    [
        (blob_of(1), math.nan, Verdict.NOT_FINITE),
        (TOO_LARGE, 0.5, Verdict.TOO_LARGE),
        (TOO_FAR, 0.5, Verdict.TOO_LARGE),
    ],
)
async def test_what_no_theta_takes_is_kept_as_refused(
    office: Office, blob: bytes, loss: float, verdict: Verdict
) -> None:
    office.fetches.put(order("a", blob, loss=loss))
    office.send("a", blob, (await office.wanted("a")).chunks)
    await until(lambda: office.desk.kept)
    assert office.desk.kept[0].verdict is verdict


def nan() -> bytes:
    """An encoding of what no codec encodes."""
    return blob_of(1)[:13] + encode_array(np.full(WEIGHTS, math.nan, dtype=np.float32))


@pytest.mark.parametrize(
    "blob", [blob_of(1)[:-1], blob_of(1, WEIGHTS - 1), b"x" * 100, nan()], ids=["cut", "too few", "noise", "nan"]
)
async def test_what_is_no_displacement_is_missed(office: Office, blob: bytes) -> None:
    hostile = order("a", blob)
    office.fetches.put(hostile)
    office.send("a", blob, (await office.wanted("a")).chunks)
    await until(lambda: office.desk.told)
    (missed,) = office.desk.told
    assert isinstance(missed, e.ValuesMissed)
    assert (missed.node, missed.update, office.desk.kept) == ("a", hostile.update, [])


async def test_chunks_that_are_not_of_the_hash_are_missed(office: Office) -> None:
    blob, other = blob_of(1), bytes(len(blob_of(1)))
    office.fetches.put(order("a", blob))
    office.send("a", other, (await office.wanted("a")).chunks, name=short_hash(blob))
    await until(lambda: office.desk.told)
    assert isinstance(office.desk.told[0], e.ValuesMissed)


async def test_nothing_is_asked_where_more_is_announced_than_a_displacement_can_have(office: Office) -> None:
    office.fetches.put(order("a", b"x", size=largest_blob(WEIGHTS) + 1))
    await until(lambda: office.desk.told)
    assert isinstance(office.desk.told[0], e.ValuesMissed)
    assert office.desk.wants == []


async def test_a_silent_node_is_missed_and_another_ones_chunk_is_not_taken(office: Office) -> None:
    blob = blob_of(1)
    office.fetches.put(order("a", blob))
    await office.wanted("a")
    with pytest.raises(BadValue, match="was not asked for"):
        office.send("b", blob, (0,))
    with pytest.raises(BadValue, match="of another blob"):
        office.send("a", blob_of(2), (0,))
    await until(lambda: office.desk.told)
    assert isinstance(office.desk.told[0], e.ValuesMissed)
    assert len(office.desk.wants) == module.SILENCES


async def test_a_node_that_is_never_silent_holds_up_the_others_for_so_long_only(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blob_fetch, "PATIENCE_S", 3600.0)
    monkeypatch.setattr(module, "LONGEST_S", 0.1)
    slow, other = order("a", blob_of(1)), blob_of(2)
    office.fetches.put(slow)
    await office.wanted("a")
    office.send("a", blob_of(1), (0,))
    await until(lambda: office.desk.told)
    (missed,) = office.desk.told
    assert isinstance(missed, e.ValuesMissed)
    assert (missed.node, missed.update, office.desk.kept) == ("a", slow.update, [])
    with pytest.raises(BadValue, match="was not asked for"):
        office.send("a", blob_of(1), (1,))

    monkeypatch.setattr(module, "LONGEST_S", 3600.0)
    office.fetches.put(order("b", other))
    office.send("b", other, (await office.wanted("b")).chunks)
    await until(lambda: office.desk.kept)
    assert office.desk.kept[0].blob == other


async def test_the_time_of_a_fetch_begins_when_there_is_room_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 1)
    monkeypatch.setattr(module, "LONGEST_S", 0.1)
    monkeypatch.setattr(blob_fetch, "PATIENCE_S", 3600.0)
    office = Office()
    task = asyncio.create_task(office.fetches.run())
    for number, node in enumerate("abc", 1):
        office.fetches.put(order(node, blob_of(number)))
    await until(lambda: len(office.desk.told) == 3)
    assert [node for node, _ in office.desk.wants] == ["a", "b", "c"]
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_no_displacement_is_looked_at_on_the_event_loop(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def watched(values: Float32Array, loss: float, *bound: float) -> Verdict:
        threads.append(threading.current_thread())
        return verdict_on(values, loss, *bound)

    monkeypatch.setattr(module, "verdict_on", watched)
    blob = blob_of(1)
    office.fetches.put(order("a", blob))
    office.send("a", blob, (await office.wanted("a")).chunks)
    await until(lambda: office.desk.kept)
    assert office.desk.kept[0].verdict is Verdict.ACCEPTED
    assert threading.current_thread() not in threads
    assert len(threads) == 1


async def test_of_a_node_the_newest_counts(office: Office) -> None:
    old, new = blob_of(1), blob_of(2)
    office.fetches.put(order("a", old))
    await office.wanted("a")
    office.fetches.put(order("a", new, version=1))
    want = await office.wanted("a", 2)
    assert want.blob == short_hash(new)
    office.send("a", new, want.chunks)
    await until(lambda: office.desk.kept)
    assert [kept.blob for kept in office.desk.kept] == [new]
    assert office.desk.told == []


async def test_so_many_at_once_and_a_new_term_forgets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 2)
    office = Office()
    task = asyncio.create_task(office.fetches.run())
    blobs = {node: blob_of(number) for number, node in enumerate("abcd", 1)}
    for node, blob in blobs.items():
        office.fetches.put(order(node, blob))
    await office.wanted("b")
    assert [node for node, _ in office.desk.wants] == ["a", "b"]
    office.send("a", blobs["a"], (await office.wanted("a")).chunks)
    await office.wanted("c")
    office.fetches.forget()
    with pytest.raises(BadValue, match="was not asked for"):
        office.send("b", blobs["b"], (0,))
    office.fetches.put(order("d", blobs["d"]))
    office.send("d", blobs["d"], (await office.wanted("d")).chunks)
    await until(lambda: len(office.desk.kept) == 2)
    assert [kept.node for kept in office.desk.kept] == ["a", "d"]
    assert office.desk.told == []
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def test_memory_bounds_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMORY_BYTES", 3 * largest_blob(WEIGHTS) + 1)
    assert Fetches(WEIGHTS, Desk(), print)._room._value == 3
    monkeypatch.setattr(module, "MEMORY_BYTES", 1)
    assert Fetches(WEIGHTS, Desk(), print)._room._value == 1
