"""One number, one clock, one name: what the log says of a round is what ledger, JSON and topics say of it."""

import json
from datetime import datetime
from pathlib import Path

from meerkat_mq.ledger.inspect import rounds_shown
from tests.server.federation import Federation, all_end
from tests.support.command import Meerkat


async def test_a_round_has_one_number_and_one_clock(federation: Federation, meerkat: Meerkat, tmp_path: Path) -> None:
    node = federation.node("n0", exit_when_finished=True)
    server = federation.server("--once", rounds={"count": 5, "deadline_s": 20})
    assert await all_end(server, node) == [0, 0], (server.plain, node.plain)
    closed = server.said("round closed")
    assert [line["round"] for line in closed] == list(range(5))
    with federation.ledger() as ledger:
        shown = list(rounds_shown(ledger, 0, 10))
    assert [found.round for found in shown] == list(range(5))
    for line, found in zip(closed, shown, strict=True):
        assert line["loss"] == round(found.loss or 0, 5)
        said, kept = (datetime.fromisoformat(at) for at in (line["timestamp"], found.closed))
        assert said.tzinfo == kept.tzinfo
        assert abs((said - kept).total_seconds()) < 5
    (whole,) = map(json.loads, meerkat("ledger", tmp_path / "server", "--round", 3, "--json").out.splitlines())
    assert (whole["round"], whole["closed"]) == (3, shown[3].closed)
    (status,) = map(json.loads, meerkat("status", tmp_path / "server", "--json").out.splitlines())
    assert (status["round"], status["rounds"]) == (5, 5)
    births = federation.eye.statuses["n0"]
    assert status["nodes"][0]["boot"] == births[-1].boot
    assert f" {births[-1].boot} " in meerkat("ledger", tmp_path / "server", "--round", 3).out


async def test_each_service_says_connected_once_and_stopped_last_in_flat_lines(federation: Federation) -> None:
    node = federation.node("n0", exit_when_finished=True)
    server = federation.server("--once", rounds={"count": 3, "deadline_s": 20})
    assert await all_end(server, node) == [0, 0]
    for service in (server, node):
        assert len(service.said("connected")) == 1
        lines = [json.loads(line) for line in service.config.with_suffix(".log").read_text().splitlines()]
        assert lines[-1]["event"] == "stopped"
        assert not [line for line in lines if any(isinstance(value, dict | list) for value in line.values())]
    (finished,) = node.said("finished")
    sent = {line["kind"]: line for line in node.said("traffic", direction="sent")}
    assert finished["sent_bytes"] == sum(line["packet_bytes"] for line in sent.values())
    assert sent["update"]["messages"] >= 3
    assert finished["received_bytes"] > 0


async def test_a_stopped_server_says_so(federation: Federation) -> None:
    server = federation.server(rounds={"count": 3})
    await server.says("in charge")
    server.stop()
    await server.ended()
    assert server.said("stopped")
