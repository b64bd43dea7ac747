"""Certificates that a broker takes or refuses, with `broker/mosquitto-tls.conf` (and NATS's)."""

import shutil
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from meerkat_mq.broker.certs import revoke_certificates, write_certificates
from meerkat_mq.errors import BadCredentials, BrokerError
from meerkat_mq.mqtt.tls import client_context
from tests.broker.guarded import NODES, STOLEN, Guarded, node, own_words, without_rabbitmq
from tests.server.federation import PACE, TOPICS, Federation
from tests.support.broker import HOST
from tests.support.peer import Peer
from tests.support.waiting import until

pytestmark = without_rabbitmq


@own_words
async def test_a_revoked_certificate_is_refused_and_the_federation_goes_on(
    federation: Federation, guarded: Guarded
) -> None:
    """As documented: `meerkat certs revoke`, its list beside the broker's certificate, a restart."""
    for name in (*NODES, STOLEN):
        federation.node(name, broker=guarded.table(f"nodes/{name}"))
    rounds = PACE | {"min_nodes": 2, "deadline_s": 30.0}
    server = federation.server(rounds=rounds, broker=guarded.table("server"))
    await server.says("round closed", heard=3)
    copy = shutil.copytree(guarded.certificates / "nodes" / STOLEN, guarded.certificates / "copy")
    assert revoke_certificates(guarded.certificates, [STOLEN]) == {STOLEN: 1}
    guarded.broker.stop()
    await until(lambda: federation.eye.reasons)  # it has read all that the broker said before it stopped
    before = len(federation.eye.messages)
    guarded.broker.start()
    await server.says("round closed", heard=2, times=len(server.said("round closed", heard=2)) + 5)
    with pytest.raises(BadCredentials, match="refuses the client certificate"):
        await Peer(guarded.way(copy), STOLEN).task
    senders = {parsed[0] for message in federation.eye.messages[before:] if (parsed := TOPICS.parse_up(message.topic))}
    assert senders == set(NODES)

    list(write_certificates(guarded.certificates, nodes=[STOLEN], renew=True))
    async with node(guarded, 2):
        pass  # its new certificate is good, without a word to the broker
    with pytest.raises(BadCredentials, match="refuses the client certificate"):
        await Peer(guarded.way(copy), STOLEN).task


async def test_nobody_comes_in_without_a_certificate(federation: Federation, guarded: Guarded) -> None:
    table = {key: value for key, value in guarded.table("nodes/node-0").items() if key in ("url", "ca_file")}
    await federation.node("node-0", broker=table).failed(
        5, f"{HOST}:{guarded.port}: refuses", "certificate", "broker.cert_file"
    )


async def test_a_certificate_of_another_ca_is_refused(guarded: Guarded, tmp_path: Path) -> None:
    list(write_certificates(tmp_path / "other", nodes=["node-0"]))
    own = guarded.way("nodes/node-0")
    stranger = guarded.way(tmp_path / "other/nodes/node-0").model_copy(update={"ca_file": own.ca_file})
    with pytest.raises(BadCredentials, match=r"refuses the client certificate.*broker\.cert_file"):
        await Peer(stranger, "a").task


@pytest.mark.not_on(nats="calls every bad certificate just that, and the remedy names the ways to be bad")
async def test_an_expired_certificate_ends_a_node_in_words(federation: Federation, guarded: Guarded) -> None:
    table = guarded.table(guarded.issue("nodes/node-7", days=30, ago=31))
    node = federation.node("node-7", broker=table)
    await node.failed(5, f"{HOST}:{guarded.port}: ", f"{table['cert_file']}: it has expired", "meerkat certs")


async def test_an_expired_certificate_of_the_broker_is_named_until_it_is_renewed(guarded: Guarded) -> None:
    """A fleet that ended for it would have to be started again by hand."""
    guarded.issue("broker", days=30, ago=31, hosts=[HOST])
    guarded.broker.kill()
    guarded.broker.start()
    with capture_logs() as logs:
        waiting = Peer(guarded.way("nodes/node-0"), "a")
        await until(lambda: len(logs) >= 2)
        assert {entry["event"] for entry in logs} == {"broker unreachable"}
        assert "the broker's certificate is out of date" in logs[0]["problem"]
        list(write_certificates(guarded.certificates, hosts=[HOST], renew=True))
        guarded.reload()
        await waiting.connected()
        await waiting.leave()


@own_words
async def test_a_node_with_anothers_certificate_names_it_and_goes_on(federation: Federation, guarded: Guarded) -> None:
    rightful = federation.node("node-1", broker=guarded.table("nodes/node-1"))
    wrong = federation.node("node-0", broker=guarded.table("nodes/node-1"))
    server = federation.server(rounds=PACE, broker=guarded.table("server"))
    await server.says("in charge")
    line = await wrong.says("connection lost", short_lived=3)
    file = guarded.table("nodes/node-1")["cert_file"]
    assert f"{file} is the certificate of 'node-1', and this is 'node-0'" in line["hint"]
    assert not any("another process" in line.get("hint", "") for line in wrong.said("connection lost"))
    assert not any("certificate" in line.get("hint", "") for line in rightful.said("connection lost"))
    for name in ("cert.pem", "key.pem"):  # mended in place: no restart
        folder = Path(file).parent
        (folder / name).write_bytes((folder.parent / "node-0" / name).read_bytes())
    await federation.eye.status("node-0", "online")
    assert not wrong.over


CBC = "ECDHE-ECDSA-AES128-SHA256:ECDHE-ECDSA-AES256-SHA:ECDHE-ECDSA-AES128-SHA"


@own_words
async def test_a_broker_with_weak_cipher_suites_alone_is_refused_in_words(guarded: Guarded) -> None:
    guarded.replace("ciphers ECDHE+AESGCM:ECDHE+CHACHA20", f"ciphers {CBC}\nciphers_tls1.3 TLS_AES_128_CCM_SHA256")
    with pytest.raises(BrokerError, match="no TLS version and cipher suite in common"):
        await Peer(guarded.way("nodes/node-0"), "a").task


def test_a_client_offers_no_weak_cipher_suite(guarded: Guarded) -> None:
    offered = client_context(guarded.way("nodes/node-0")).get_ciphers()
    assert len(offered) > 4
    assert all(suite["aead"] and suite["protocol"] in ("TLSv1.2", "TLSv1.3") for suite in offered)
