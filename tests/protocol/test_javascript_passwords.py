"""Attack H23 on the node in JavaScript, which takes its password in the URL."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.protocol.javascript import JavaScriptNode
from tests.support.broker import HOST, Broker

USER = "user:s3cret@"


@pytest.mark.parametrize(
    "flags",
    [
        (f"mqtt://{USER}{HOST}",),
        ("--broker", f"http://{USER}{HOST}"),
        ("--broker", f"mqtt://{USER}{HOST}:port"),
        ("--broker", f"mqtt://{USER}{HOST}", f"--mqtt://{USER}x"),
        ("--broker", f"mqtt://{USER}{HOST}", "--federation", "f", "--id", "a", "--data", f"mqtt://{USER}{HOST}"),
    ],
)
def test_no_error_shows_a_password(javascript: Path, flags: tuple[str, ...]) -> None:
    given = flags if "--id" in flags else (*flags, "--federation", "f", "--id", "a", "--data", "x")
    done = subprocess.run(["node", "node.mjs", *given], cwd=javascript, capture_output=True, text=True, check=False)
    assert done.returncode in (2, 3)
    assert done.stderr.startswith("meerkat-js: ")
    assert "s3cret" not in done.stderr + done.stdout


@pytest.mark.parametrize(("host", "warns"), [(HOST, False), ("0.0.0.0", True)])
async def test_a_refused_password_is_not_shown_and_one_without_encryption_is_warned_of(
    make_mosquitto: Callable[..., Broker], javascript: Path, tmp_path: Path, host: str, warns: bool
) -> None:
    broker = make_mosquitto(anonymous=False)
    (tmp_path / "rows.jsonl").write_text('{"seed": 7}\n')
    url = f"mqtt://{USER}{host}:{broker.port}"
    flags = ("--broker", url, "--federation", "f", "--id", "a", "--data", str(tmp_path / "rows.jsonl"))
    node = JavaScriptNode(javascript, tmp_path / "a.log", *flags)
    assert await node.ended() == 5
    assert "mqtt://***@" in node.plain[0]
    assert "s3cret" not in (tmp_path / "a.log").read_text()
    assert len(node.said("password sent without encryption")) == warns
