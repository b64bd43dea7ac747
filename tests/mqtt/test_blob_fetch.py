"""Collecting a blob chunk by chunk, and when to give up."""

import asyncio

import pytest

from meerkat_mq.errors import BadValue, NotConnected, TooLarge
from meerkat_mq.mqtt import blob_fetch
from meerkat_mq.mqtt.blob_fetch import CHUNKS_A_WANT, BlobFetch
from meerkat_mq.wire.arrays import split
from meerkat_mq.wire.messages import Chunk, Header
from tests.support.virtual_time import at_once
from tests.support.waiting import until

HEADER, NAME = Header(0, 0, 0, bytes(8)), bytes(range(16))
BLOB = bytes(range(256)) * 256 * 3
CHUNKS = split(HEADER, NAME, BLOB)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blob_fetch, "PATIENCE_S", 0.02)


def test_it_gives_up_after_so_many_silences_and_says_what_lacks() -> None:
    async def collect() -> None:
        fetch = BlobFetch(NAME, len(BLOB), asked.append)
        fetch.add(CHUNKS[1])
        await fetch.collect(silences=3)

    asked: list[tuple[int, ...]] = []
    with pytest.raises(NotConnected, match=r"2 chunks did not come, and none in the last 0\.08 s"):
        at_once(collect())
    assert asked == [(0, 2), (2,), (2,)]


async def test_chunks_that_are_there_already_do_not_count_as_news() -> None:
    def repeat(chunks: tuple[int, ...]) -> None:
        asyncio.get_running_loop().call_later(0.005, fetch.add, CHUNKS[0])

    fetch = BlobFetch(NAME, len(BLOB), repeat)
    with pytest.raises(NotConnected, match="2 chunks"):
        await fetch.collect(silences=3)


async def test_a_slow_server_is_waited_for_as_long_as_something_comes() -> None:
    def one_of_them(chunks: tuple[int, ...]) -> None:
        asked.append(chunks)
        if len(asked) % 2 == 0:
            fetch.add(CHUNKS[chunks[-1]])

    asked: list[tuple[int, ...]] = []
    fetch = BlobFetch(NAME, len(BLOB), one_of_them)
    assert await fetch.collect(silences=3) == BLOB
    assert asked == [(0, 1, 2), (2,), (0, 1), (1,), (0,), (0,)]


@pytest.mark.parametrize("unasked", [False, True])
@pytest.mark.parametrize("seconds_a_chunk", [0.1, 2.5, 8.0, 40.0])
def test_a_slow_link_carries_each_chunk_about_once(
    seconds_a_chunk: float, unasked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that carries chunks in order, each in its time, whether it is wanted or not; on a virtual clock."""
    monkeypatch.setattr(blob_fetch, "PATIENCE_S", 3.0)
    blob = bytes(65536 * 60)
    chunks, queue = split(HEADER, NAME, blob), list[int]()

    async def carry(fetch: BlobFetch) -> None:
        while True:
            await asyncio.sleep(seconds_a_chunk)
            if queue:
                carried.append(queue.pop(0))
                fetch.add(chunks[carried[-1]])

    async def collect() -> bytes:
        fetch = BlobFetch(NAME, len(blob), queue.extend)
        if unasked:
            queue.extend(range(len(chunks)))
        carrying = asyncio.create_task(carry(fetch))
        try:
            return await fetch.collect(unasked=unasked, silences=4)
        finally:
            carrying.cancel()

    carried: list[int] = []
    assert at_once(collect()) == blob
    assert len(carried) <= len(chunks) + 4


def test_however_long_a_server_was_away_it_is_asked_within_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a virtual clock."""
    monkeypatch.setattr(blob_fetch, "PATIENCE_S", 3.0)
    comes_back_at, answered_at = 100_000.0, list[float]()

    async def collect() -> bytes:
        def serve(chunks: tuple[int, ...]) -> None:
            now = asyncio.get_running_loop().time()
            if now >= comes_back_at:
                answered_at.append(now)
                for index in chunks:
                    fetch.add(CHUNKS[index])

        fetch = BlobFetch(NAME, len(BLOB), serve)
        return await fetch.collect()

    assert at_once(collect()) == BLOB
    assert answered_at[0] <= comes_back_at + 60


async def test_what_comes_unasked_is_not_asked_for() -> None:
    fetch = BlobFetch(NAME, len(BLOB), lambda chunks: pytest.fail("asked"))
    for chunk in CHUNKS:
        fetch.add(chunk)
    assert await fetch.collect(unasked=True) == BLOB


async def test_what_went_with_a_connection_is_asked_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blob_fetch, "PATIENCE_S", 600.0)
    asked: list[tuple[int, ...]] = []
    fetch = BlobFetch(NAME, len(BLOB), asked.append)
    fetch.ask_again()
    collecting = asyncio.create_task(fetch.collect())
    await until(lambda: asked)
    fetch.add(CHUNKS[1])
    fetch.ask_again()
    await until(lambda: asked == [(0, 1, 2), (0, 2)])
    fetch.add(CHUNKS[0])
    fetch.add(CHUNKS[2])
    assert await collecting == BLOB


def test_on_a_new_connection_a_slow_link_is_asked_again_at_once_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks come after their first silence, so none of those asked for is waited for any more."""
    monkeypatch.setattr(blob_fetch, "PATIENCE_S", 3.0)

    async def collect() -> None:
        fetch = BlobFetch(NAME, len(BLOB), asked.append)
        collecting = asyncio.create_task(fetch.collect())
        await asyncio.sleep(10.0)
        fetch.add(CHUNKS[0])
        await asyncio.sleep(1.0)
        fetch.ask_again()
        await asyncio.sleep(0.1)
        assert asked == [(0, 1, 2), (2,), (2,), (1, 2)]
        collecting.cancel()

    asked: list[tuple[int, ...]] = []
    at_once(collect())


def test_new_connections_alone_do_not_keep_up_hope() -> None:
    async def collect() -> None:
        fetch = BlobFetch(NAME, len(BLOB), lambda chunks: None)
        collecting = asyncio.create_task(fetch.collect(silences=4))
        for _ in range(100):
            await asyncio.sleep(0.05)
            fetch.ask_again()
        await collecting

    with pytest.raises(NotConnected):
        at_once(collect())


def test_after_an_outage_a_want_that_is_lost_costs_a_minute_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blob_fetch, "PATIENCE_S", 3.0)
    blob = bytes(65536 * 40)
    chunks = split(HEADER, NAME, blob)

    async def collect() -> bytes:
        def serve(wanted: tuple[int, ...]) -> None:
            now = asyncio.get_running_loop().time()
            if now >= 600.0 and 0 not in wanted:  # the first want after the outage is lost
                for index in wanted:
                    asyncio.get_running_loop().call_later(0.1, fetch.add, chunks[index])
            elif now >= 600.0 and not lost:
                lost.append(now)
            elif now >= 600.0:
                served.append(now)
                for index in wanted:
                    fetch.add(chunks[index])

        fetch = BlobFetch(NAME, len(blob), serve)
        return await fetch.collect()

    lost, served = list[float](), list[float]()
    assert at_once(collect()) == blob
    assert lost[0] <= 661.0
    assert served[0] <= lost[0] + 61.0


async def test_a_new_connection_asks_for_nothing_that_comes_unasked() -> None:
    fetch = BlobFetch(NAME, len(BLOB), lambda chunks: pytest.fail("asked"))
    collecting = asyncio.create_task(fetch.collect(unasked=True))
    await asyncio.sleep(0)
    fetch.ask_again()
    for chunk in CHUNKS:
        fetch.add(chunk)
    assert await collecting == BLOB


async def test_no_want_asks_for_more_than_its_part() -> None:
    def serve(chunks: tuple[int, ...]) -> None:
        assert len(chunks) <= CHUNKS_A_WANT
        for index in chunks:
            fetch.add(many[index])

    blob = bytes(65536 * 40)
    many = split(HEADER, NAME, blob)
    fetch = BlobFetch(NAME, len(blob), serve)
    assert await fetch.collect() == blob


async def test_chunks_of_another_blob_are_refused() -> None:
    fetch = BlobFetch(NAME, len(BLOB), lambda chunks: None)
    with pytest.raises(BadValue, match="another blob"):
        fetch.add(Chunk(HEADER, bytes(16), 0, 3, len(BLOB), BLOB[:65536]))


async def test_more_than_a_blob_can_be_is_refused_before_anything_is_allocated() -> None:
    with pytest.raises(TooLarge):
        BlobFetch(NAME, 2**32 - 1, lambda chunks: None)
