"""An engine that raises what its library raises: the node names it, counts it, and tries again."""

from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.engines.toy import QuadraticEngine
from tests.node.mini_server import MiniServer, node
from tests.support.mosquitto import Mosquitto


@pytest.mark.parametrize("uplink", ["path", "values"])
async def test_a_step_that_fails_is_made_again(
    mosquitto: Mosquitto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uplink: str
) -> None:
    method = {"path": "losses", "values": "gradient"}[uplink]
    works, failures = getattr(QuadraticEngine, method), ["CUDA out of memory.\n  stack\n  trace"]

    def fails(engine: QuadraticEngine, batch: Any) -> Float32Array:
        if failures:
            raise RuntimeError(failures.pop())
        return works(engine, batch)  # type: ignore[no-any-return]

    monkeypatch.setattr(QuadraticEngine, method, fails)
    with capture_logs() as lines:
        async with MiniServer(mosquitto.config, values=True) as server, node(tmp_path, mosquitto.config, uplink=uplink):
            server.announce()
            assert (await server.update()).header.version == 0
    said = [line for line in lines if line["event"] == "steps failed"]
    assert {line.get("problem") for line in said} == {"CUDA out of memory.", None}
