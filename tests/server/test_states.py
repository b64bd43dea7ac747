"""What `mosquitto_sub` shows of a run while it goes on, by the retained states: round, version, digest."""

import json

import pytest

from tests.server.federation import TOPICS, Federation
from tests.support.peer import Peer
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(150)


async def test_states_follow_the_run_at_a_low_rate_and_are_true(federation: Federation) -> None:
    eye = federation.eye
    node = federation.node("n0")
    server = federation.server(rounds={"count": 1_000_000, "deadline_s": 20})
    await node.says("ready")
    await until(lambda: len({state.round for state in eye.states if state.round}) >= 2, within_s=60)
    await until(lambda: any(status.version for status in eye.statuses["n0"]), within_s=60)
    live = [state for state in eye.states if state.status == "online" and state.round]
    assert {(state.term, state.link, state.server_id) for state in live} == {
        (live[0].term, live[0].link, live[0].server_id),
    }
    assert [state.round for state in live] == sorted(state.round for state in live)
    with federation.ledger() as ledger:
        for status in (status for status in eye.statuses["n0"] if status.version):
            (entry,) = ledger.entries(status.version - 1, 1)
            assert status.digest == entry.digest.hex()
    closed = server.said("round closed")
    assert len(live) <= 3 + float(len(closed)) / 3
    late = await Peer(federation.broker, "late", [(TOPICS.server, 1), (TOPICS.up("n0", "status"), 1)]).connected()
    await until(lambda: len({message.topic for message in late.messages if message.retained}) == 2)
    said = {message.topic: json.loads(message.payload) for message in late.messages if message.retained}
    await late.leave()
    assert said[TOPICS.server]["round"] >= 3
    assert said[TOPICS.up("n0", "status")]["version"] >= 10
