"""The outbox: in order, bounded, newest wins, nothing forgotten."""

import asyncio

import pytest

from meerkat_mq.errors import NotConnected
from meerkat_mq.mqtt.outbox import Outbox, Outgoing


def out(topic: str, payload: bytes = b"", *, retain: bool = False) -> Outgoing:
    return Outgoing(topic, payload, 1, retain, asyncio.get_running_loop().create_future())


def filled(*items: Outgoing, limit_bytes: int = 10**6) -> Outbox:
    box = Outbox(limit_bytes, window_messages=3, window_bytes=10_000)
    for item in items:
        box.put(item)
    return box


async def take_all(box: Outbox) -> list[Outgoing]:
    taken = []
    while len(box):
        taken.append(await asyncio.wait_for(box.take(), 1))
        box.acknowledge(taken[-1])
    return taken


async def test_messages_leave_in_order() -> None:
    items = [out(f"t/{i}") for i in range(10)]
    assert await take_all(filled(*items)) == items
    assert all(item.done.done() for item in items)


async def test_a_newer_retained_message_takes_the_older_ones_place() -> None:
    """At the end, what is said again and again would be put off again and again."""
    first, old, between, new = (
        out("one"),
        out("state", b"1", retain=True),
        out("other"),
        out("state", b"2", retain=True),
    )
    assert await take_all(filled(first, old, between, new)) == [first, new, between]
    assert old.done.result() is None


async def test_what_is_retained_goes_before_replies_where_it_is_told_to() -> None:
    items = [out("reply"), out("reply"), out("round", b"1", retain=True), out("reply"), out("state", retain=True)]
    box = Outbox(10**6, retained_first=True)
    for item in items:
        box.put(item)
    assert await box.take() is items[2]
    box.put(newer := out("round", b"2", retain=True))
    box.rewind()
    assert await take_all(box) == [newer, items[4], items[0], items[1], items[3]]
    assert items[2].done.result() is None


async def test_messages_that_are_not_retained_are_all_kept() -> None:
    items = [out("update", b"1"), out("update", b"2")]
    assert await take_all(filled(*items)) == items


async def test_what_was_in_flight_goes_first_after_a_disconnection() -> None:
    items = [out(f"t/{i}") for i in range(5)]
    box = filled(*items)
    assert [await box.take(), await box.take()] == items[:2]
    box.acknowledge(items[0])
    box.rewind()
    assert await take_all(box) == items[1:]


async def test_a_retained_message_in_flight_yields_to_a_newer_one_after_a_disconnection() -> None:
    old, new = out("state", b"1", retain=True), out("state", b"2", retain=True)
    box = filled(old)
    await box.take()
    box.put(new)
    box.rewind()
    assert await take_all(box) == [new]
    assert old.done.done()


async def test_what_is_put_ahead_goes_first_and_replaces_older_state() -> None:
    old, update, birth = out("state", b"1", retain=True), out("update"), out("state", b"2", retain=True)
    box = filled(old, update)
    with box.ahead():
        box.put(birth)
    assert await take_all(box) == [birth, update]


async def test_state_put_after_a_rewind_still_replaces_what_waits() -> None:
    old, new = out("state", b"1", retain=True), out("state", b"2", retain=True)
    box = filled(old)
    box.rewind()
    with box.ahead():
        pass
    box.put(new)
    assert await take_all(box) == [new]


async def test_the_window_limits_messages_in_flight() -> None:
    items = [out(f"t/{i}") for i in range(4)]
    box = filled(*items)
    for _ in range(3):
        await box.take()
    fourth = asyncio.create_task(box.take())
    await asyncio.sleep(0)
    assert not fourth.done()
    box.acknowledge(items[1])
    assert await fourth is items[3]


async def test_the_window_limits_bytes_in_flight_but_lets_one_message_through() -> None:
    big, small = out("a", bytes(50_000)), out("b")
    box = filled(big, small)
    assert await box.take() is big
    second = asyncio.create_task(box.take())
    await asyncio.sleep(0)
    assert not second.done()
    box.acknowledge(big)
    assert await second is small


async def test_a_full_outbox_refuses_and_takes_again_once_there_is_room() -> None:
    first = out("a", bytes(1000))
    box = filled(first, limit_bytes=2000)
    with pytest.raises(NotConnected, match="1 messages"):
        box.put(out("b", bytes(1000)))
    await take_all(box)
    box.put(out("b", bytes(1000)))


async def test_replacing_state_for_ever_does_not_fill_the_outbox() -> None:
    box = filled(limit_bytes=10_000)
    for i in range(1000):
        box.put(out("state", b"%d" % i, retain=True))
    assert [item.payload for item in await take_all(box)] == [b"999"]


async def test_a_full_outbox_takes_what_is_retained_and_nothing_else() -> None:
    first, old, new = out("a", bytes(1000)), out("state", b"1", retain=True), out("state", b"2", retain=True)
    box = filled(first, old, new, limit_bytes=first.cost)
    assert old.done.result() is None
    with pytest.raises(NotConnected, match="2 messages"):
        box.put(out("b"))
    assert await take_all(box) == [first, new]
    box.put(out("b", bytes(1000)))  # what was retained is forgotten as well


async def test_closing_tells_those_who_wait_and_those_who_come_later() -> None:
    waiting, late = out("a"), out("b")
    box = filled(waiting)
    box.close(NotConnected("broker", "gone"))
    box.put(late)
    for item in (waiting, late):
        with pytest.raises(NotConnected):
            await item.done
    box.acknowledge(waiting)
    assert len(box) == 0
