"""Damaged messages for a running federation: server, Python node and JavaScript node take them, and go on.

What is sent decodes only by chance; half of it has its checksum put right. A message that does decode is left out where
its sender would be believed: a newer process of a node, a server of a higher rank, a term above the server's.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from meerkat_mq.errors import WireError
from meerkat_mq.wire.descriptor import ControlMessage, NodeStatus, RunDescriptor, ServerState, decode_control
from meerkat_mq.wire.frames import decode, encode
from meerkat_mq.wire.messages import Chunk, Entries, Frame, Offer, Reason, Refusal, Update, Want, Welcome
from tests.fuzz.mutate_bytes import MESSAGES, damaged
from tests.protocol.javascript import JavaScriptNode
from tests.server.federation import PACE, TOPICS, Federation, Service
from tests.support.resident import resident_mib

GROWTH_MIB = 20.0
AT_ONCE = 500
AFTER_S = 600.0  # nodes that were led astray have paused for some seconds; a server has to be above the terms they saw
ROUNDS = PACE | {"min_nodes": 3, "quorum": 1.0, "deadline_s": 5.0}

pytestmark = pytest.mark.timeout(max(400, MESSAGES / 100))


class Storm:
    """Damaged copies of what a federation says to itself."""

    def __init__(self, federation: Federation) -> None:
        eye = federation.eye
        self._run, self._round, self._state = eye.runs[-1], eye.rounds[-1], eye.states[-1]
        header = self._round.header
        below: list[Frame] = [
            self._round, Entries(header, self._round.entries), Welcome(header, 7, 0), Offer(header, 9, bytes(16), 999),
            Refusal(header, 7, Reason.RESYNCHRONISE), Chunk(header, self._run.mask_name, 0, 1, 3, b"abc"),
        ]  # fmt: skip
        above: list[Frame] = [
            Update(header, 7, bytes(8), 0.5, (1.0,)), Chunk(header, bytes(16), 0, 1, 3, b"abc"),
            Want(header, 7, welcome=True, entries_from=0, blob=self._run.mask_name, chunks=(0, 1)),
        ]  # fmt: skip
        status = NodeStatus(status="online", boot=7, link=1, host="h", run=self._run.run, rows=3)
        nodes = ("node-0", "node-1", "js-1", "stranger")
        self._samples: list[tuple[list[str], list[bytes], bool]] = [
            (["round", "values", *(f"down/{node}/reply" for node in nodes)], list(map(encode, below)), False),
            ([f"up/{node}/{kind}" for node in nodes for kind in ("update", "want")], list(map(encode, above)), False),
            ([f"up/{node}/status" for node in nodes], [status.encode()], True),
            (["server"], [self._state.encode()], True),
            (["run"], [self._run.encode()], True),
        ]

    def messages(self, count: int) -> Iterator[tuple[str, bytes]]:
        """So many topics below the federation's, with payloads."""
        chance, number = random.Random(7), 0
        while count:
            number += 1
            topics, samples, text = chance.choices(self._samples, (8, 8, 2, 1, 1))[0]
            topic, payload = chance.choice(topics), damaged("live", samples, number, text=text)
            if len(payload) < 2**17 and not self._is_believed(topic, payload):
                count -= 1
                yield topic, payload

    def _is_believed(self, topic: str, payload: bytes) -> bool:
        kinds: dict[str, type[ControlMessage]] = {"server": ServerState, "run": RunDescriptor, "status": NodeStatus}
        kind = kinds.get(topic.rsplit("/", 1)[-1])
        try:
            found: Any = decode(payload) if kind is None else decode_control(payload, kind)
        except WireError:
            return False
        if isinstance(found, NodeStatus):
            return "stranger" not in topic
        if isinstance(found, ServerState | RunDescriptor):
            return True
        return bool(found.header.term > self._state.term)


async def storm(federation: Federation, names: dict[str, int]) -> None:
    """Send it; memory of the processes, by name, does not grow by more than a little."""
    eye, before = federation.eye, dict[str, float]()
    messages = Storm(federation).messages(MESSAGES)
    sent = 0
    while sent < MESSAGES:
        batch = [message for _, message in zip(range(AT_ONCE), messages, strict=False)]
        eye.noise.update(payload for _, payload in batch)
        for topic, payload in batch:
            eye.session.publish(f"{TOPICS.root}/{topic}", payload)
        await eye.session.drain(60)
        sent += len(batch)
        if not before and sent >= MESSAGES / 10:
            before = {name: resident_mib(pid) for name, pid in names.items()}
    grown = {name: resident_mib(pid) - before[name] for name, pid in names.items()}
    assert all(mib < GROWTH_MIB for mib in grown.values()), grown


def nothing_broke(services: list[Service], js: JavaScriptNode) -> None:
    for service in services:
        assert not service.over, service.plain
        assert service.plain == []
    assert not js.over, js.plain
    assert js.plain == []


@pytest.mark.not_on(
    nats="its limits end the storm's connection", rabbitmq="takes minutes for what Mosquitto does in one"
)
async def test_damaged_messages_end_nobody(federation: Federation, start_node: Callable[..., JavaScriptNode]) -> None:
    nodes = [federation.node(f"node-{number}") for number in range(2)]
    js = start_node()
    server = federation.server(rounds=ROUNDS)
    await server.says("round closed", heard=3, times=3)
    await storm(federation, {"server": server.pid, "node-0": nodes[0].pid, "js-1": js.pid})
    closed = len(server.said("round closed", heard=3))
    await server.says("round closed", heard=3, times=closed + 3, within_s=AFTER_S)
    nothing_broke([server, *nodes], js)
    assert server.said("message dropped")
