"""A process of the node in JavaScript."""

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.support.waiting import until

PATIENCE_S = 60.0


class JavaScriptNode:
    """`node node.mjs …`, and what it says: JSON lines, and one line of words where it fails."""

    def __init__(self, folder: Path, log: Path, *flags: str) -> None:
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                ["node", "node.mjs", *flags], cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )

    @property
    def lines(self) -> list[str]:
        """Whole lines so far."""
        text = self._log.read_text("utf-8")
        return text[: text.rfind("\n") + 1].splitlines()

    @property
    def plain(self) -> list[str]:
        """Those that are no events."""
        return [line for line in self.lines if not line.startswith("{")]

    def said(self, event: str) -> list[dict[str, Any]]:
        """Events of this name, oldest first."""
        events = [json.loads(line) for line in self.lines if line.startswith("{")]
        return [found for found in events if found["event"] == event]

    async def says(self, event: str, *, times: int = 1) -> dict[str, Any]:
        """Wait for the n-th such event."""
        await until(lambda: len(self.said(event)) >= times or self.over, within_s=PATIENCE_S)
        assert len(self.said(event)) >= times, (event, self.lines)
        return self.said(event)[times - 1]

    @property
    def over(self) -> bool:
        return self._process.poll() is not None

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ended(self) -> int:
        """Wait for the end; the exit code."""
        await until(lambda: self.over, within_s=PATIENCE_S)
        return int(self._process.returncode)

    def stop(self) -> None:
        """SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
