"""The node in JavaScript against a server by hand: what goes wrong on a wire, and displacements."""

import subprocess
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meerkat_mq.config import BrokerConfig, Codec
from meerkat_mq.core.directions import direction
from meerkat_mq.core.path import Coefficient
from meerkat_mq.wire.descriptor import NodeStatus
from meerkat_mq.wire.frames import Reason, Refusal, encode
from meerkat_mq.wire.values import encode_values
from tests.protocol.javascript import JavaScriptNode
from tests.protocol.scripted import NODE, SERVER_ID, TOPICS, Script
from tests.support.broker import Broker
from tests.support.waiting import until

Start = Callable[..., JavaScriptNode]

TERM = Coefficient(0, 0, 2.0**-6)

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
async def script(mosquitto: Broker) -> AsyncIterator[Script]:
    made = Script(mosquitto.config)
    await made.connected()
    yield made
    await made.leave()


async def follow(script: Script) -> None:
    """Announce the newest entry; the node stands there when it answers from that theta."""
    script.announce()
    await arrives(script)


async def arrives(script: Script) -> None:
    update = await script.hears_update(len(script.entries))
    assert update.base == script.digest[:8]


async def begin(script: Script, **settings: object) -> None:
    """The node has answered the first round."""
    script.describe(**settings)
    await script.hears_update(0)


async def test_an_update_is_sent_again_until_it_is_heard(script: Script, start_node: Start) -> None:
    start_node()
    await begin(script)
    script.announce()
    again = await script.hears_update(0, times=2)
    assert again == script.updates[0]
    assert len(again.scalars) == 2
    script.announce(heard=frozenset({0}))
    script.close(TERM)
    await follow(script)
    assert [update.header.version for update in script.updates] == [0, 0, 1]


async def test_a_short_list_and_another_lane_are_kept_to(script: Script, start_node: Start) -> None:
    start_node()
    await begin(script)
    script.close(TERM)
    script.rules["steps"] = 5
    script.announce(short=((0, 3),))
    assert len((await script.hears_update(1)).scalars) == 3


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8"])
async def test_displacements_are_applied_after_terms(script: Script, start_node: Start, codec: Codec) -> None:
    start_node()
    await begin(script, values=True)
    for seed, pushed_first in ((1, False), (2, True)):
        values = encode_values(direction("mk1", seed, 0, script.mask.size) * np.float32(0.01), codec)
        script.close(TERM, values=values)
        if pushed_first:
            script.push()
        script.announce()
        if not pushed_first:
            script.push()
        await arrives(script)
    assert script.asked_for_displacements() == []


async def test_chunks_that_were_not_heard_are_asked_for(mosquitto: Broker, start_node: Start) -> None:
    script = Script(mosquitto.config, weights=50_000)
    await script.connected()
    start_node()
    await begin(script, values=True)
    script.close(values=encode_values(direction("mk1", 9, 0, 50_000), "float32"))
    script.announce()
    script.push(1)
    await arrives(script)
    last, others = script.asked_for_displacements()
    count = len(script.chunks(last.blob or b""))
    assert (last.chunks, others.chunks) == ((count - 1,), (0, *range(2, count - 1)))
    await script.leave()


async def test_chunks_are_asked_for_again_where_the_server_connects_anew(mosquitto: Broker, start_node: Start) -> None:
    script = Script(mosquitto.config, weights=50_000)
    await script.connected()
    start_node()
    await begin(script, values=True)
    for seed in (1, 2):
        script.close(values=encode_values(direction("mk1", seed, 0, 50_000), "float32"))
    older, blobs = next(e.displacement.blob for e in script.entries if e.displacement is not None), script.blobs
    script.blobs = {}
    script.announce()
    await until(script.asked_for_displacements)
    script.blobs = blobs
    script.lead(SERVER_ID, link=2)
    every = tuple(range(len(script.chunks(older))))
    await until(lambda: [want.chunks for want in script.asked_for_displacements()].count(every) >= 2)
    await follow(script)
    await script.leave()


async def test_a_missed_displacement_of_an_older_entry_is_asked_for_at_once(script: Script, start_node: Start) -> None:
    start_node()
    await begin(script, values=True)
    for seed in (1, 2, 3):
        script.close(TERM, values=encode_values(direction("mk1", seed, 0, script.mask.size), "int8"))
    script.announce()
    await follow(script)
    named = [entry.displacement.blob for entry in script.entries if entry.displacement is not None]
    assert [want.blob for want in script.asked_for_displacements()] == named


async def test_terms_of_older_versions_are_drawn_from_their_seeds(script: Script, start_node: Start) -> None:
    start_node()
    await begin(script, mode="buffered", max_staleness=3)
    script.close(TERM)
    script.close(TERM, Coefficient(0, 1, 2.0**-7, 1))
    script.close(Coefficient(0, 0, 2.0**-5, 2))
    await follow(script)


async def test_in_a_buffered_run_an_unheard_update_goes_out_again_until_it_is_too_old(
    script: Script, start_node: Start
) -> None:
    start_node()
    await begin(script, mode="buffered", max_staleness=1)
    script.close(TERM)
    script.announce(asked=frozenset({0}), heard_before=())
    await script.hears_update(1)
    assert [update.header.version for update in script.updates] == [0, 0, 1]
    script.close(TERM)
    script.announce(heard_before=((0, 1),))
    await script.hears_update(2)
    assert [update.header.version for update in script.updates] == [0, 0, 1, 2]


async def test_a_wrong_digest_makes_it_begin_again(script: Script, start_node: Start) -> None:
    node = start_node()
    await begin(script)
    script.close(TERM)
    script.announce(entries=(replace(script.entries[0], digest=bytes(16)),))
    await node.says("resynchronised")
    await follow(script)
    assert any(want.entries_from == 0 for want in script.wants)


async def test_a_node_that_never_arrives_says_so_and_waits_longer_each_time(script: Script, start_node: Start) -> None:
    node = start_node()
    await begin(script)
    script.close(TERM)
    right = script.entries[0]
    script.entries[0] = replace(right, digest=b"\1" * 16)
    script.announce()
    await node.says("cannot take part, trying again later", times=2)
    said = node.said("cannot take part, trying again later")
    assert [line["again_in_s"] for line in said[:2]] == [2, 4]
    words = "version 0: this node does not arrive at the server's theta (the digest after entry 0 differs)"
    assert {line["problem"] for line in said} == {words}
    await until(lambda: words in {status.refuses for status in script.statuses})
    script.entries[0] = right  # the cause is gone
    await follow(script)
    assert script.statuses[-1].status == "online"


async def test_a_refusal_to_resynchronise_is_obeyed(script: Script, start_node: Start) -> None:
    node = start_node()
    await begin(script)
    script.close(TERM)
    await follow(script)
    refused = script.updates[-1]
    script.reply(Refusal(script.header, refused.boot, Reason.RESYNCHRONISE))
    await node.says("resynchronised")
    await script.hears_update(1, times=2)
    assert script.updates[-1].base == refused.base


async def test_another_past_counts_under_a_higher_term_only(script: Script, start_node: Start) -> None:
    node = start_node()
    await begin(script)
    script.close(TERM)
    await follow(script)
    script.start_over(term=1)
    script.close(Coefficient(0, 1, 0.5))
    script.close(Coefficient(0, 0, 0.5))
    script.announce()
    await node.says("entry refused")
    assert node.said("resynchronised") == []
    script.term = 2
    script.lead("6" * 16)
    script.announce()
    await node.says("resynchronised")
    await follow(script)
    assert script.updates[-1].header.term == 2


async def test_a_lower_term_is_not_followed(script: Script, start_node: Start) -> None:
    node = start_node()
    script.term = 5
    await begin(script)
    script.term = 4
    script.lead("7" * 16)
    script.announce(attempt=7)
    await node.says("stale server")
    await node.says("stale term")
    script.term = 5
    script.close(TERM)
    await follow(script)


async def test_two_servers_in_a_term_are_told_of_a_higher_one(script: Script, start_node: Start) -> None:
    node = start_node()
    await begin(script)
    script.lead("9" * 16)
    await node.says("two servers in a term")
    await until(lambda: [want.header.term for want in script.wants if want.welcome][-1:] == [2])


async def test_junk_is_dropped_and_counted(script: Script, start_node: Start) -> None:
    node = start_node()
    await begin(script)
    good = encode(Refusal(script.header, 1, Reason.RESYNCHRONISE))
    junk = {TOPICS.round: b"MK", TOPICS.reply(NODE): good[:-1] + b"\0", TOPICS.server: b"{", TOPICS.values: good}
    for topic, payload in junk.items():
        script.session.publish(topic, payload)
    script.session.publish(TOPICS.run, b'{"protocol":2}')
    await node.says("message dropped", times=5)
    assert {found["topic"]: found["error"] for found in node.said("message dropped")} == {
        TOPICS.round: "Truncated", TOPICS.reply(NODE): "BadChecksum", TOPICS.server: "BadValue",
        TOPICS.values: "BadValue", TOPICS.run: "BadValue",
    }  # fmt: skip
    script.close(TERM)
    await follow(script)


async def test_a_late_will_is_overwritten_and_a_second_process_takes_over(script: Script, start_node: Start) -> None:
    first = start_node()
    await begin(script)
    late = NodeStatus(status="lost", boot=script.statuses[-1].boot, link=0, host="here")
    script.session.publish(TOPICS.up(NODE, "status"), late.encode(), retain=True)
    await until(lambda: [status.status for status in script.statuses][-2:] == ["lost", "online"])
    second = start_node(name="second")
    assert await first.ended() == 6
    assert len(first.plain) == 1
    assert "another process with this id" in first.plain[0]
    await second.says("ready")
    await until(lambda: script.statuses[-1].status == "online")


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ((), 2, "--broker: is missing"),
        (("--colour", "red"), 2, "--colour"),
        (("--broker", "mqtt://127.0.0.1", "--federation", "f", "--id", "a/b", "--data", "x"), 2, "--id"),
        (("--broker", "http://x", "--federation", "f", "--id", "a", "--data", "x"), 2, "--broker"),
        (("--broker", "mqtt://127.0.0.1", "--federation", "f", "--id", "a", "--data", "nowhere"), 3, "ENOENT"),
        (("--broker", "mqtt://127.0.0.1", "--federation", "f", "--id", "a", "--data", "node.mjs"), 3, "node.mjs:1: is"),
    ],
)
def test_what_cannot_be_is_one_line_and_an_exit_code(
    javascript: Path, flags: tuple[str, ...], code: int, words: str
) -> None:
    done = subprocess.run(["node", "node.mjs", *flags], cwd=javascript, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.startswith("meerkat-js: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


async def test_a_broker_that_refuses_it_ends_it(
    make_mosquitto: Callable[..., Broker], javascript: Path, tmp_path: Path
) -> None:
    broker: BrokerConfig = make_mosquitto(anonymous=False).config
    (tmp_path / "rows.jsonl").write_text('{"seed": 7}\n')
    flags = ("--broker", broker.url, "--federation", "f", "--id", "a", "--data", str(tmp_path / "rows.jsonl"))
    node = JavaScriptNode(javascript, tmp_path / "a.log", *flags)
    assert await node.ended() == 5
    assert len(node.plain) == 1


async def test_it_outlives_its_broker_and_ends_without_one(
    mosquitto: Broker, script: Script, start_node: Start
) -> None:
    node = start_node()
    await begin(script)
    mosquitto.kill()
    await node.says("connection lost")
    mosquitto.start()
    await script.connected(2)
    script.describe()
    script.close(TERM)
    await follow(script)
    mosquitto.kill()
    await node.says("connection lost", times=2)
    node.stop()
    assert await node.ended() == 0
    assert node.plain == []
