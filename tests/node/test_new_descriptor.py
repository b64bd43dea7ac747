"""A server that was upgraded describes the same run anew: other bytes of the same mask."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from structlog.testing import capture_logs

from meerkat_mq.core.path import short_hash
from meerkat_mq.wire.arrays import encode_mask
from tests.node.mini_server import TOPICS, MiniServer, node
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import until


async def test_a_node_that_has_no_mask_yet_takes_the_new_name_and_size(mosquitto: Mosquitto, tmp_path: Path) -> None:
    server = MiniServer(mosquitto.config, retains_mask=False, mask_bytes=70_000, mask_chunks=2)
    blob = server.has.pop(server.mask.hash)
    async with server, node(tmp_path, mosquitto.config):
        await until(lambda: [want for want in server.wants if want.blob == server.mask.hash])
        server.has[short_hash(blob)] = encode_mask(server.mask)
        news = {"mask_blob": short_hash(blob).hex(), "mask_bytes": len(blob), "mask_chunks": 1}
        server.peer.session.publish(TOPICS.run, server.run.model_copy(update=news).encode(), retain=True)
        await server.status("online")
        assert server.wants[-1].blob in (short_hash(blob), None)
        server.announce()
        assert (await server.update()).header.mask == server.mask.hash[:8]


async def test_no_descriptor_of_the_same_run_changes_what_is_fixed(mosquitto: Mosquitto, tmp_path: Path) -> None:
    with capture_logs() as lines:
        async with MiniServer(mosquitto.config) as server, node(tmp_path, mosquitto.config):
            await server.status("online")
            for changes in ({"lr": 9.0}, {"mask_blob": "1" * 32, "mask_bytes": 1, "model": "elsewhere"}):
                server.peer.session.publish(TOPICS.run, server.run.model_copy(update=changes).encode())
            server.announce()
            await server.update()
    (dropped,) = [line for line in lines if line["event"] == "message dropped"]
    assert "RunDescriptor.lr: was 0.1, and is 9.0 in the same run" in dropped["problem"]
    assert len([line for line in lines if line["event"] == "ready"]) == 1


def refuses(server: MiniServer, words: str) -> bool:
    return words in (server.statuses[-1].refuses or "")


async def test_runs_that_do_not_suit_a_node_leave_it_waiting_on_the_broker(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    async with MiniServer(mosquitto.config) as server, node(tmp_path, mosquitto.config) as process:
        server.announce()
        await server.update()
        for run, engine in (("a" * 32, "os:system"), ("b" * 32, "others:Engine")):
            foreign = server.run.model_copy(update={"run": run, "engine": engine})
            server.peer.session.publish(TOPICS.run, foreign.encode(), retain=True)
            await until(partial(refuses, server, engine))
            assert server.statuses[-1].status == "starting"
        server.peer.session.publish(TOPICS.run, server.run.encode(), retain=True)
        await server.status("online")
        server.announce()
        await server.update(2)
        assert not process.done()


async def test_a_node_that_never_arrives_at_the_digest_waits_and_goes_on(mosquitto: Mosquitto, tmp_path: Path) -> None:
    async with MiniServer(mosquitto.config) as server, node(tmp_path, mosquitto.config) as process:
        server.announce()
        await server.update()
        server.close()
        right = server.entries[0]
        server.entries[0] = replace(right, digest=b"\1" * 16)
        server.announce()
        await until(partial(refuses, server, "does not arrive at the server's theta"))
        server.entries[0] = right  # the cause is gone
        server.announce()
        await server.update_from(1)
        assert not process.done()
