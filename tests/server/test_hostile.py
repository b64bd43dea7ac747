"""Bytes that no peer of ours sends, on every topic: counted, dropped, and the run goes on."""

import random

import pytest

from meerkat_mq.wire.descriptor import NodeStatus
from meerkat_mq.wire.frames import encode
from meerkat_mq.wire.messages import Chunk, Entries, Frame, Header, Reason, Refusal, Round, Update, Want, Welcome
from tests.server.federation import PACE, TOPICS, Federation, all_end
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(150)

OTHER = Header.of(bytes(16), 3, 7, bytes(16))
FRAMES: list[Frame] = [
    Update(OTHER, 1, bytes(8), 0.5, (1.0,)),
    Round(OTHER, is_open=True, steps=1, lanes=1, eps=1e-3, deadline_ms=1000, asked=frozenset({0, 1})),
    Want(OTHER, 1, welcome=True, entries_from=0, blob=bytes(16), chunks=(0, 65535)),
    Welcome(OTHER, 1, 5),
    Entries(OTHER, ()),
    Chunk(OTHER, bytes(16), 0, 1, 3, b"abc"),
    Refusal(OTHER, 1, Reason.RESYNCHRONISE),
]
JSON = [
    b"null",
    b"[]",
    b"{}",
    b'"x"',
    b"1e999",
    b'{"status": 7}',
    b'{"status": "online"}',
    b"[" * 50_000,
    b'{"status": "' + b"x" * 200_000 + b'"}',
    b'{"a": ' * 2000,
    b"\xff\xfe",
    b'{"protocol": 2}',
]


def noise() -> list[bytes]:
    """All of it, the same each time."""
    rng = random.Random(7)
    frames = [encode(frame) for frame in FRAMES]
    cut = [frame[: rng.randrange(1, len(frame))] for frame in frames]
    bent = [bytes([*frame[:-1], frame[-1] ^ 1]) for frame in frames]
    random_bytes = [rng.randbytes(size) for size in (1, 3, 24, 52, 1000, 100_000)]
    magic = [b"MK\x01" + rng.randbytes(60), b"MK\x02" + rng.randbytes(60), b"MK\x01\x09" + rng.randbytes(60)]
    return [b"", b"\0", *frames, *cut, *bent, *random_bytes, *magic, *JSON]


async def test_hostile_bytes_on_every_topic_are_counted_and_dropped(federation: Federation) -> None:
    eye = federation.eye
    nodes = [federation.node(f"node-{i}", exit_when_finished=True) for i in range(2)]
    await federation.ghost(25)
    server = federation.server(rounds=PACE | {"count": 25, "min_nodes": 3})
    await server.says("round closed", heard=2, times=3)

    payloads = noise()
    eye.noise.update(payloads)
    topics = [
        "server", "run", "round", f"blob/{eye.runs[-1].mask}/0", "down/node-0/reply", "up/node-0/status",
        "up/node-0/update", "up/node-0/want", "up/stranger/status", "up/stranger/update", "up/stranger/want",
        "up/node-1/nonsense", "nonsense",
    ]  # fmt: skip
    for topic in topics:
        for retain in (False, True):
            for payload in payloads:
                eye.session.publish(f"{TOPICS.root}/{topic}", payload, retain=retain)
    await eye.session.drain(30)

    late = federation.node("node-2", exit_when_finished=True)
    assert await all_end(*nodes, late) == [0, 0, 0], [service.plain for service in (*nodes, late)]
    finished = await server.says("run finished")
    assert {node.said("finished")[0]["digest"] for node in (*nodes, late)} == {finished["digest"]}
    for kind in ("BadMagic", "BadChecksum", "Truncated", "BadValue", "UnknownType", "UnknownVersion", "TooLarge"):
        assert finished[f"counted_undecodable_{kind.lower()}"] > 0
        assert nodes[0].said("finished")[0][f"counted_undecodable_{kind.lower()}"] > 0
    assert finished["counted_of_another_run"] > 0
    assert finished["counted_misplaced_round"] > 0
    assert nodes[0].said("finished")[0]["counted_of_another_run"] > 0


async def test_a_stranger_in_another_run_gets_no_part_and_delays_nobody(federation: Federation) -> None:
    eye = federation.eye
    federation.node("node-0")
    server = federation.server(rounds={"count": 1_000_000})
    await server.says("round closed", times=3)
    stranger = NodeStatus(status="online", boot=1, link=1, host="x\n\x1b[31m", run="0" * 32, rows=2**32 - 1)
    await federation.retain("up/stranger/status", stranger.encode())
    await until(lambda: len(eye.runs) > 1)  # told of the run
    before = len(server.said("round closed"))
    await server.says("round closed", times=before + 20)
    assert all(line["heard"] == line["online"] == 1 for line in server.said("round closed"))
