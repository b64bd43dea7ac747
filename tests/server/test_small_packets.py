"""A broker that takes small packets only, and what goes first over a link."""

import pytest

from meerkat_mq.wire.topics import Topics
from tests.server.federation import NAME, PACE, Federation
from tests.support.peer import Peer
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(150)

SMALL = {"max_packet_bytes": 2048}


async def test_a_node_that_is_400_rounds_late_catches_up(federation: Federation) -> None:
    count, known = 400, {"count": 400, "local_steps": 20, "snapshot_every": 1_000_000}
    server = federation.server(rounds=known | {"deadline_s": 5.0}, toy_weights=40, broker=SMALL)
    federation.node("early", broker=SMALL)
    await federation.eye.reaches(count)
    federation.node("late", broker=SMALL)
    await until(lambda: [said.version for said in federation.eye.statuses.get("late", ())][-1:] == [count], within_s=60)
    assert len(federation.eye.wants["late"]) > count * 192 / 2048  # an entry of 20 terms has 192 bytes
    assert not server.over
    assert not server.said("not published")


async def test_the_round_goes_before_the_mask(federation: Federation) -> None:
    topics = Topics(NAME)
    all_topics = [(topics.round, 1), (topics.run, 1), (f"{topics.root}/blob/#", 1)]
    seen = await Peer(federation.broker, "seen", all_topics).connected()
    await federation.ghost()
    federation.server(rounds=PACE, toy_weights=100_000)
    await until(lambda: sum("/blob/" in message.topic for message in seen.messages) >= 5, within_s=60)
    await seen.leave()
    first = [message.topic.removeprefix(f"{topics.root}/").split("/")[0] for message in seen.messages][:3]
    assert first == ["run", "round", "blob"]
