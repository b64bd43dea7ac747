"""Attack H22 on the node in JavaScript: what it prints steers no terminal, and stays JSON."""

import json
import subprocess
from pathlib import Path

import pytest

STEERING = ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\u202e", "\x7f", "\u2028", "\U000e0041"]
LINE = 'import("./errors.mjs").then(m => console.log(m.jsonLine({ event: process.argv[1] })))'


@pytest.mark.parametrize("name", STEERING)
def test_a_line_of_its_log(javascript: Path, name: str) -> None:
    done = subprocess.run(["node", "-e", LINE, name], cwd=javascript, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip("\n").isprintable()
    assert json.loads(done.stdout) == {"event": name}


@pytest.mark.parametrize("name", STEERING)
def test_an_end_in_words(javascript: Path, name: str) -> None:
    flags = ("--broker", "mqtt://127.0.0.1:1", "--federation", "f", "--id", "a", "--data", f"/none/{name}")
    done = subprocess.run(["node", "node.mjs", *flags], cwd=javascript, capture_output=True, check=False)
    text = done.stderr.decode()
    assert done.returncode
    assert all(char.isprintable() or char == "\n" for char in text)
