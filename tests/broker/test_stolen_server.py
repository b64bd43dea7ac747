"""The server's certificate is stolen: who has it takes the highest term there is, and is the server from then on.

On a broker with rights, nobody else can: nodes may not write the server's topics (test_hardened.py).
"""

import pytest

from meerkat_mq.broker.certs import revoke_certificates
from meerkat_mq.wire.descriptor import ServerState
from tests.broker.guarded import Guarded, own_words, without_rabbitmq
from tests.server.federation import PACE, TOPICS, Federation
from tests.support.command import Meerkat
from tests.support.peer import Peer
from tests.support.waiting import until

pytestmark = [without_rabbitmq, pytest.mark.timeout(180)]

HIGHEST = 2**32 - 1


@own_words
@pytest.mark.parametrize("plays", ["another", "the very same"])
async def test_it_is_said_and_the_documented_remedy_brings_the_run_back(
    federation: Federation, guarded: Guarded, meerkat: Meerkat, plays: str
) -> None:
    rounds = PACE | {"deadline_s": 30.0}
    node = federation.node("node-0", broker=guarded.table("nodes/node-0"))
    server = federation.server(rounds=rounds, broker=guarded.table("server"))
    await server.says("round closed", times=3)
    true = federation.eye.states[-1]
    server_id = true.server_id if plays == "the very same" else "e" * 16
    said = {"term": HIGHEST, "host": "evil", "link": 1, "server_id": server_id}
    forged = ServerState.model_validate(true.model_dump() | said)
    thief = await Peer(guarded.way("server"), "thief").connected()
    await thief.session.publish(TOPICS.server, forged.encode(), retain=True)
    await server.failed(6, "a server of term 4294967295 on host evil has taken over", "stop it")
    assert not node.over
    await thief.leave()
    before = federation.eye.version

    again = federation.server(rounds=rounds, broker=guarded.table("server"))
    await again.failed(6)  # not in its place, and not above it: the broker still has what the thief said

    assert revoke_certificates(guarded.certificates, ["meerkat.server"]) == {"meerkat.server": 1}
    assert meerkat("certs", "renew", guarded.certificates, "meerkat.server").code == 0
    guarded.broker.stop()
    guarded.broker.start()
    server = federation.server(rounds=rounds, broker=guarded.table("server"))
    await server.says("in charge")
    node.stop()
    assert await node.ended() == 0
    federation.node("node-0", broker=guarded.table("nodes/node-0"))
    await server.says("round closed")
    await until(lambda: federation.eye.version > before, within_s=60.0)
