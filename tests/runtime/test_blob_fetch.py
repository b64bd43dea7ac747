"""Collecting a blob chunk by chunk, and when to give up."""

from collections.abc import Callable

import pytest

from meerkat_mq.errors import BadValue, NotConnected, TooLarge
from meerkat_mq.runtime.blobs import CHUNKS_A_WANT, PATIENCE_S, BlobFetch
from meerkat_mq.runtime.steps import Sequence
from meerkat_mq.wire.arrays import split
from meerkat_mq.wire.messages import Chunk, Header
from tests.runtime.ports import VirtualClock

HEADER, NAME = Header(0, 0, 0, bytes(8)), bytes(range(16))
BLOB = bytes(range(256)) * 256 * 3
CHUNKS = split(HEADER, NAME, BLOB)
assert PATIENCE_S == 3.0


class Collection:
    """One blob that is collected, and what was asked for.

    Attributes:
        serve: takes what is asked for.
        found: the blob, once it is there.
    """

    def __init__(self, size: int = len(BLOB)) -> None:
        self.clock = VirtualClock()
        self.asked: list[tuple[int, ...]] = []
        self.serve: Callable[[tuple[int, ...]], object] = lambda chunks: None
        self.found: list[bytes] = []
        self.fetch = BlobFetch(NAME, size, self._ask, self.clock)

    def begin(self, *, unasked: bool = False, silences: int | None = None) -> None:
        Sequence(self.fetch.collect(unasked=unasked, silences=silences), self.found.append)

    def whole(self, *, unasked: bool = False, silences: int | None = None) -> bytes:
        self.begin(unasked=unasked, silences=silences)
        self.clock.until(lambda: self.found)
        (blob,) = self.found
        return blob

    def bring(self, chunk: Chunk, after_s: float = 0.0) -> None:
        self.clock.at(self.clock.now() + after_s, lambda: self.fetch.add(chunk))

    def _ask(self, chunks: tuple[int, ...]) -> None:
        self.asked.append(chunks)
        self.serve(chunks)


def test_it_gives_up_after_so_many_silences_and_says_what_lacks() -> None:
    it = Collection()
    it.fetch.add(CHUNKS[1])
    with pytest.raises(NotConnected, match=r"2 chunks did not come, and none in the last 12 s"):
        it.whole(silences=3)
    assert it.asked == [(0, 2), (2,), (2,)]
    assert it.clock.now() == 3 + 6 + 12


def test_chunks_that_are_there_already_do_not_count_as_news() -> None:
    it = Collection()
    it.serve = lambda chunks: it.bring(CHUNKS[0], after_s=0.75)
    with pytest.raises(NotConnected, match="2 chunks"):
        it.whole(silences=3)


def test_a_slow_server_is_waited_for_as_long_as_something_comes() -> None:
    def one_of_them(chunks: tuple[int, ...]) -> None:
        if len(it.asked) % 2 == 0:
            it.bring(CHUNKS[chunks[-1]])

    it = Collection()
    it.serve = one_of_them
    assert it.whole(silences=3) == BLOB
    assert it.asked == [(0, 1, 2), (2,), (0, 1), (1,), (0,), (0,)]


@pytest.mark.parametrize("unasked", [False, True])
@pytest.mark.parametrize("seconds_a_chunk", [0.1, 2.5, 8.0, 40.0])
def test_a_slow_link_carries_each_chunk_about_once(seconds_a_chunk: float, unasked: bool) -> None:
    """One that carries chunks in order, each in its time, whether it is wanted or not."""
    blob = bytes(65536 * 60)
    chunks, queue, carried = split(HEADER, NAME, blob), list[int](), list[int]()

    def carry() -> None:
        if queue:
            carried.append(queue.pop(0))
            it.fetch.add(chunks[carried[-1]])
        it.clock.at(it.clock.now() + seconds_a_chunk, carry)

    it = Collection(len(blob))
    it.serve = queue.extend
    if unasked:
        queue.extend(range(len(chunks)))
    it.clock.at(seconds_a_chunk, carry)
    assert it.whole(unasked=unasked, silences=4) == blob
    assert len(carried) <= len(chunks) + 4


def test_however_long_a_server_was_away_it_is_asked_within_a_minute() -> None:
    comes_back_at, answered_at = 100_000.0, list[float]()

    def serve(chunks: tuple[int, ...]) -> None:
        if it.clock.now() >= comes_back_at:
            answered_at.append(it.clock.now())
            for index in chunks:
                it.bring(CHUNKS[index])

    it = Collection()
    it.serve = serve
    assert it.whole() == BLOB
    assert answered_at[0] <= comes_back_at + 60


def test_what_comes_unasked_is_not_asked_for() -> None:
    it = Collection()
    for chunk in CHUNKS:
        it.fetch.add(chunk)
    assert it.whole(unasked=True) == BLOB
    assert it.asked == []


def test_what_went_with_a_connection_is_asked_again_at_once() -> None:
    it = Collection()
    it.fetch.ask_again()
    assert it.asked == []
    it.begin()
    it.fetch.add(CHUNKS[1])
    it.fetch.ask_again()
    assert it.asked == [(0, 1, 2), (0, 2)]
    it.fetch.add(CHUNKS[0])
    it.fetch.add(CHUNKS[2])
    assert it.found == [BLOB]
    assert it.clock.now() == 0.0


def test_on_a_new_connection_a_slow_link_is_asked_again_at_once_too() -> None:
    """Chunks come after their first silence, so none of those asked for is waited for any more."""
    it = Collection()
    it.begin()
    it.clock.go(10.0)
    it.fetch.add(CHUNKS[0])
    it.clock.go(1.0)
    it.fetch.ask_again()
    it.clock.go(0.1)
    assert it.asked == [(0, 1, 2), (2,), (2,), (1, 2)]


def test_new_connections_alone_do_not_keep_up_hope() -> None:
    it = Collection()
    it.begin(silences=4)
    for number in range(1, 101):
        it.clock.at(7.5 * number, it.fetch.ask_again)
    with pytest.raises(NotConnected):
        it.clock.go(1000.0)


def test_after_an_outage_a_want_that_is_lost_costs_a_minute_at_most() -> None:
    blob = bytes(65536 * 40)
    chunks, lost, served = split(HEADER, NAME, blob), list[float](), list[float]()

    def serve(wanted: tuple[int, ...]) -> None:
        now = it.clock.now()
        if now < 600.0:
            return
        if 0 in wanted and not lost:  # the first want after the outage is lost
            lost.append(now)
            return
        if 0 in wanted:
            served.append(now)
        for index in wanted:
            it.bring(chunks[index], after_s=0.1 if 0 not in wanted else 0.0)

    it = Collection(len(blob))
    it.serve = serve
    assert it.whole() == blob
    assert lost[0] <= 661.0
    assert served[0] <= lost[0] + 61.0


def test_a_new_connection_asks_for_nothing_that_comes_unasked() -> None:
    it = Collection()
    it.begin(unasked=True)
    it.fetch.ask_again()
    for chunk in CHUNKS:
        it.fetch.add(chunk)
    assert (it.found, it.asked) == ([BLOB], [])


def test_no_want_asks_for_more_than_its_part() -> None:
    def serve(chunks: tuple[int, ...]) -> None:
        assert len(chunks) <= CHUNKS_A_WANT
        for index in chunks:
            it.bring(many[index])

    blob = bytes(65536 * 40)
    many = split(HEADER, NAME, blob)
    it = Collection(len(blob))
    it.serve = serve
    assert it.whole() == blob
    assert it.clock.now() == 0.0  # nor is there a pause between two wants


def test_who_gave_up_asks_no_more() -> None:
    it = Collection()
    it.begin()
    it.clock.go(2.0)
    with pytest.raises(NotConnected, match=r"did not come whole within 2 s"):
        it.fetch.give_up()
    it.fetch.ask_again()
    it.clock.go(1000.0)
    assert (it.asked, it.found) == ([(0, 1, 2)], [])


def test_chunks_of_another_blob_are_refused() -> None:
    with pytest.raises(BadValue, match="another blob"):
        Collection().fetch.add(Chunk(HEADER, bytes(16), 0, 3, len(BLOB), BLOB[:65536]))


def test_more_than_a_blob_can_be_is_refused_before_anything_is_allocated() -> None:
    with pytest.raises(TooLarge):
        Collection(2**32 - 1)
