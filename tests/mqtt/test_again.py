"""A session that ends and runs again, as that of a node that sleeps."""

import asyncio
import contextlib

import pytest

from meerkat_mq.errors import NotConnected
from meerkat_mq.mqtt import Will
from meerkat_mq.mqtt.connection import Connection
from tests.support.mosquitto import Mosquitto
from tests.support.peer import Peer, peer
from tests.support.waiting import until

TIMES = 20


async def again(a: Peer) -> None:
    a.task = asyncio.create_task(a.session.run())


async def test_a_session_runs_again_with_its_subscriptions_and_no_will_fires(mosquitto: Mosquitto) -> None:
    async with peer(mosquitto.config, "watcher", [("s", 1), ("a", 1)]) as watcher:

        def times() -> int:
            return len(a.links)

        a: Peer = Peer(
            mosquitto.config,
            "a",
            [("a", 1)],
            will=lambda link: Will("s", b"lost"),
            farewell=lambda link: Will("s", b"asleep %d" % times()),
            greet=lambda link: a.session.publish("s", b"awake %d" % times(), retain=True),
        )
        a.session.subscribe("b")
        for time in range(1, TIMES + 1):
            await a.connected(times=time)
            a.session.publish("a", b"%d" % time)
            watcher.session.publish("b", b"%d" % time)
            await until(lambda time=time: a.payloads.count(b"%d" % time) == 2)  # type: ignore[misc]
            await a.leave()
            await until(lambda time=time: b"asleep %d" % time in watcher.payloads)  # type: ignore[misc]
            if time < TIMES:
                await again(a)
        said = [payload for payload in watcher.payloads if not payload.isdigit()]
        assert said == [word % time for time in range(1, TIMES + 1) for word in (b"awake %d", b"asleep %d")]
        assert len(a.links) == len(set(a.links)) == TIMES
        assert a.reasons == []


async def test_a_session_that_is_cancelled_while_it_leaves_runs_again(
    mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaving, end = asyncio.Event(), Connection.end

    async def hang(connection: Connection, *, orderly: bool) -> None:
        assert connection._client is not None

        async def leave() -> None:
            leaving.set()
            await asyncio.Event().wait()

        connection._leave = leave  # type: ignore[method-assign]
        await end(connection, orderly=orderly)

    async with peer(mosquitto.config, "a") as a:
        with monkeypatch.context() as patched:
            patched.setattr(Connection, "end", hang)
            a.task.cancel()
            await asyncio.wait_for(leaving.wait(), 10)
            await a.leave()
        assert a.session.link is None
        await again(a)
        await a.connected(times=2)
        await asyncio.wait_for(a.session.publish("t", b"awake"), 10)


async def test_what_is_published_in_between_is_dropped(mosquitto: Mosquitto) -> None:
    async with peer(mosquitto.config, "a", [("t", 1)]) as a:
        await a.leave()
        dropped = a.session.publish("t", b"while it slept")
        assert isinstance(dropped.exception(), NotConnected)
        await again(a)
        await a.connected(times=2)
        await a.session.publish("t", b"awake")
        await until(lambda: a.payloads)
        assert a.payloads == [b"awake"]


async def test_an_end_together_with_an_answer_of_the_broker_is_an_end(mosquitto: Mosquitto) -> None:
    async with peer(mosquitto.config, "other") as other:
        await other.session.publish("t", b"retained", retain=True)
    for _ in range(TIMES):
        await ends_by_its_first_message(mosquitto)


async def ends_by_its_first_message(mosquitto: Mosquitto) -> None:
    a = Peer(mosquitto.config, "a", [("t", 1)], react=lambda message: a.task.cancel())
    with contextlib.suppress(asyncio.CancelledError):
        async with asyncio.timeout(10):
            await a.task
    assert a.task.cancelled()
