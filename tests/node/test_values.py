"""Displacements: those of the ledger, which a node gets chunk by chunk, and its own, which it gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meerkat_mq.core.directions import Float32Array, direction
from meerkat_mq.core.path import short_hash
from meerkat_mq.errors import RunMismatch
from meerkat_mq.observe.process import first_error
from meerkat_mq.runtime import blobs
from meerkat_mq.wire.arrays import Assembly
from meerkat_mq.wire.messages import Chunk, Want
from meerkat_mq.wire.values import decode_values
from tests.node.mini_server import RUN_ID, SLOT, Gate, MiniServer, node
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import until

WEIGHTS = 40_000  # more than one chunk, in float32


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "PATIENCE_S", 0.2)


def displacement(seed: int) -> Float32Array:
    return direction("mk1", seed, 0, WEIGHTS)


async def test_what_is_sent_to_all_is_not_asked_for(
    tmp_path: Path, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "PATIENCE_S", 20.0)
    async with (
        MiniServer(mosquitto.config, weights=WEIGHTS, values=True) as server,
        node(tmp_path, mosquitto.config),
    ):
        await server.status("online")
        server.announce(asked=False)  # of the first round that it sees, a node cannot know when it was opened
        await server.peer.session.drain(5.0)
        for version in (1, 2):
            blob = server.close(displacement(version))
            server.announce(asked=False)
            server.push(blob)
            await server.stands_at(version)
        assert len(blob) > 2 * 65536
        assert server.asked_chunks == []


async def test_chunks_are_asked_for_again_where_the_server_connects_anew(
    tmp_path: Path, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        MiniServer(mosquitto.config, weights=WEIGHTS, values=True) as server,
        node(tmp_path, mosquitto.config),
    ):
        await server.status("online")  # it has the mask, which not every broker gives unasked
        monkeypatch.setattr(blobs, "PATIENCE_S", 600.0)
        server.offers_chunks = False
        server.close(displacement(1))
        server.announce(asked=False)
        await until(lambda: server.asked_chunks)
        server.offers_chunks = True
        server.announce_server()
        await server.stands_at(1)
        first, *others = server.asked_chunks
        assert first in others


async def test_all_that_was_sent_while_the_node_stepped_is_there_afterwards(
    tmp_path: Path, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    buffered: dict[str, Any] = {"mode": "buffered", "max_staleness": 5}
    async with (
        MiniServer(mosquitto.config, weights=WEIGHTS, values=True, **buffered) as server,
        node(tmp_path, mosquitto.config),
    ):
        server.announce()
        await gate.has_begun(1)
        blobs = [server.close(displacement(version)) for version in (1, 2, 3)]
        server.announce(asked=False, known=3)
        for blob in blobs:
            server.push(blob)
        server.announce_server()
        await until(lambda: len(server.statuses) >= 2 and server.statuses[-1].version == 0)
        seen = len(server.statuses)
        server.announce_server()  # answered behind all that was sent before
        await until(lambda: len(server.statuses) > seen)
        gate.open()
        await server.stands_at(3)
        assert server.asked_chunks == []


async def test_what_does_not_come_is_asked_for_at_once(
    tmp_path: Path, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with MiniServer(mosquitto.config, weights=WEIGHTS, values=True) as server:
        async with node(tmp_path, mosquitto.config):
            await server.status("online")  # the mask is there, for which a node waits where no chunks are retained
        await server.status("stopped")
        monkeypatch.setattr(blobs, "PATIENCE_S", 600.0)
        blob = server.close(displacement(1))
        server.announce(asked=False)
        async with node(tmp_path, mosquitto.config):
            await server.stands_at(1)
        assert {name for name, _ in server.asked_chunks} == {short_hash(blob)}


async def test_a_node_that_comes_later_asks_for_the_displacements(tmp_path: Path, mosquitto: Mosquitto) -> None:
    async with MiniServer(mosquitto.config, weights=WEIGHTS, values=True) as server:
        blobs = [server.close(displacement(1)), server.close(), server.close(displacement(3))]
        server.announce(asked=False)
        async with node(tmp_path, mosquitto.config):
            await server.stands_at(3)
        assert {name for name, _ in server.asked_chunks} == {short_hash(blobs[0]), short_hash(blobs[2])}


async def test_a_displacement_that_does_not_come_is_missed_and_fetched_later(
    tmp_path: Path, mosquitto: Mosquitto, capsys: pytest.CaptureFixture[str]
) -> None:
    async with MiniServer(mosquitto.config, weights=WEIGHTS, values=True) as server:
        server.close(displacement(1))
        server.close(displacement(2))
        name = server.entries[1].displacement
        assert name is not None
        whole = server.has.pop(name.blob)
        server.announce(asked=False)
        async with node(tmp_path, mosquitto.config):
            await until(
                lambda: any("entries missed" in line for line in capsys.readouterr().out.splitlines()), within_s=30
            )
            assert server.statuses[-1].version == 0
            server.has[name.blob] = whole
            await server.stands_at(2)


async def test_a_displacement_that_does_not_decode_is_missed(
    tmp_path: Path, mosquitto: Mosquitto, capsys: pytest.CaptureFixture[str]
) -> None:
    async with MiniServer(mosquitto.config, weights=WEIGHTS, values=True) as server:
        blob = server.close(displacement(1))
        server.has[short_hash(blob)] = blob[::-1]
        server.announce(asked=False)
        async with node(tmp_path, mosquitto.config):
            await until(lambda: "entries missed" in capsys.readouterr().out, within_s=30)
            server.has[short_hash(blob)] = blob
            await server.stands_at(1)


# --- the node's own ---

UPLINK = {"uplink": "values", "values": {"codec": "float32", "optimiser": "sgd", "lr": 0.5}}


async def test_a_values_node_gives_its_displacement_until_it_is_heard(tmp_path: Path, mosquitto: Mosquitto) -> None:
    run: dict[str, Any] = {"mode": "buffered", "max_staleness": 2, "local_steps": 3, "values": True}
    async with (
        MiniServer(mosquitto.config, weights=WEIGHTS, **run) as server,
        node(tmp_path, mosquitto.config, **UPLINK),
    ):
        server.announce()
        update = await server.update()
        assert update.values is not None
        assert (update.scalars, update.values.steps) == ((), 3)
        moved = decode_values(await collect(server, update.boot), update.values.blob, WEIGHTS)
        target = direction("mk1", 1, 0, WEIGHTS)
        np.testing.assert_allclose(moved, target * (1 - (1 - 0.5 / WEIGHTS) ** 3), rtol=1e-3, atol=1e-9)

        server.say(Want(server.header, update.boot, blob=bytes(16), chunks=(0,)))
        server.say(Want(server.header, update.boot, blob=update.values.blob, chunks=(999,)))
        server.announce(heard=frozenset({SLOT}))
        await until(lambda: not (tmp_path / "state/update").exists())
        chunks = len(server.chunks)
        server.say(Want(server.header, update.boot, blob=update.values.blob, chunks=(0,)))
        server.close()
        server.announce()
        await server.update(2)
        assert len(server.chunks) == chunks


async def test_a_displacement_outlives_its_process(tmp_path: Path, mosquitto: Mosquitto) -> None:
    run: dict[str, Any] = {"mode": "buffered", "max_staleness": 2, "values": True}
    async with MiniServer(mosquitto.config, weights=WEIGHTS, **run) as server:
        server.announce()
        async with node(tmp_path, mosquitto.config, **UPLINK):
            update = await server.update()
        async with node(tmp_path, mosquitto.config, **UPLINK):
            assert await server.update(2) == update
            assert update.values is not None
            blob = await collect(server, update.boot)
        assert short_hash(blob) == update.values.blob


async def collect(server: MiniServer, boot: int) -> bytes:
    values = server.updates[-1].values
    assert values is not None
    count = -(-values.size // 65536)
    assembly = Assembly(values.blob, values.size, count)
    server.say(Want(server.header, boot, blob=values.blob, chunks=tuple(range(count))))
    await until(lambda: len(server.chunks) >= count)
    for chunk in server.chunks:
        assert isinstance(chunk, Chunk)
        assembly.add(chunk)
    return assembly.join()


async def test_a_values_node_in_a_run_without_values_ends_in_words(tmp_path: Path, mosquitto: Mosquitto) -> None:
    async with MiniServer(mosquitto.config) as server:
        with pytest.raises(ExceptionGroup) as caught:
            async with node(tmp_path, mosquitto.config, **UPLINK) as task:
                await task
        error = first_error(caught.value)
        assert isinstance(error, RunMismatch)
        assert str(error) == (
            f'uplink: is "values", but run {RUN_ID.hex()[:8]} takes projected gradients only; '
            'set uplink = "path" here, or values.accept = true on the server'
        )
        assert not server.statuses or server.statuses[-1].status == "stopped"
