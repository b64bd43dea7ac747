"""The real command line, in this process."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from meerkat_mq.cli import main


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    def failed(self, code: int, *words: str) -> None:
        """It ended with this code and one line, the last on stderr, that holds these words."""
        assert self.code == code, self
        line = self.err.splitlines()[-1]
        assert line.startswith("meerkat: ")
        for word in words:
            assert word in line
        assert "Traceback" not in self.err


Meerkat = Callable[..., Outcome]


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Meerkat:
    """`meerkat` as a function of its arguments."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["meerkat", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), out, err)

    return run
