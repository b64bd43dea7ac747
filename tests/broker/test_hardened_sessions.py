"""Client ids and sessions on a Mosquitto with `broker/mosquitto-tls.conf`: each is bound to a certificate."""

import re
import socket

from tests.broker.guarded import NODES, STOLEN, Guarded, node, own_words, without_rabbitmq
from tests.server.federation import NAME, PACE, Federation
from tests.support.peer import peer
from tests.support.waiting import until

pytestmark = [without_rabbitmq, own_words]


async def test_anothers_client_id_is_of_no_use(federation: Federation, guarded: Guarded) -> None:
    """Attack: with a certificate of its own, connect as the server and as each node."""
    nodes = [federation.node(name, broker=guarded.table(f"nodes/{name}")) for name in NODES]
    server = federation.server(rounds=PACE | {"min_nodes": 2}, broker=guarded.table("server"))
    await server.says("round closed", heard=2)
    server_id = (await federation.eye.state("online")).server_id
    own_names = re.findall(r" as (meerkat-\S+|[\w.-]+) \(p2", guarded.broker.log)
    names = {
        "meerkat.server",
        *own_names,
        f"meerkat-{NAME}-server-{server_id}",
        *(f"meerkat-{NAME}-{n}" for n in NODES),
    }
    for name in sorted(names):
        async with peer(guarded.way(f"nodes/{STOLEN}"), name):
            await server.says("round closed", times=len(server.said("round closed")) + 2, heard=2)
    assert not any(service.said("connection lost") for service in (server, *nodes))
    assert federation.eye.reasons == []


async def test_a_certificate_is_one_session(guarded: Guarded) -> None:
    async with node(guarded, 0) as first, peer(guarded.way("nodes/node-0"), "anything-else"):
        await until(lambda: first.reasons)


async def test_a_second_server_is_refused_and_a_replacing_one_fences_the_first(
    federation: Federation, guarded: Guarded
) -> None:
    """Although, with the first one's certificate, it pushes that off the broker whenever it looks."""
    way, rounds = guarded.table("server"), PACE | {"min_nodes": 2}
    nodes = [federation.node(name, broker=guarded.table(f"nodes/{name}")) for name in NODES]
    first = federation.server(name="first", rounds=rounds, broker=way)
    await first.says("round closed", heard=2, times=3)
    for folder in ("second", "first"):
        second = federation.server(name="second", state_dir=folder, rounds=rounds, broker=way)
        await second.failed(6, f"a server on host {socket.gethostname()} says that it is online", "--replace")
        await first.says("round closed", times=len(first.said("round closed")) + 3, heard=2)
    third = federation.server("--replace", name="third", rounds=rounds, broker=way)
    await first.failed(6, f"a server of term 2 on host {socket.gethostname()} has taken over")
    await third.says("round closed", times=3, heard=2)
    assert not any(service.over for service in nodes)


async def test_a_server_that_was_killed_goes_on_at_once(federation: Federation, guarded: Guarded) -> None:
    way, rounds = guarded.table("server"), PACE | {"min_nodes": 2}
    for name in NODES:
        federation.node(name, broker=guarded.table(f"nodes/{name}"))
    first = federation.server(rounds=rounds, broker=way)
    await first.says("round closed", heard=2)
    first.kill()
    again = federation.server(rounds=rounds, broker=way)
    await again.says("round closed", heard=2)
    assert again.said("asking whether the server before this one lives") == []
