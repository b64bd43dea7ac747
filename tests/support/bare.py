"""An environment with what `pip install meerkat-mq` brings, and no more."""

import json
import os
import re
import subprocess
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

import meerkat_mq

_DRIVER = """
import contextlib, io, json, sys, traceback
from meerkat_mq.cli import main
for arguments in json.load(sys.stdin):
    sys.argv, code, out, err = ["meerkat", *arguments], 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            code = 1
            traceback.print_exc()
    json.dump({"code": code, "out": out.getvalue(), "err": err.getvalue()}, sys.__stdout__)
    sys.__stdout__.write(chr(10))
"""


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    arguments: tuple[str, ...]
    code: int
    out: str
    err: str

    def works(self, *words: str) -> None:
        """It ended with 0, and said these words."""
        assert self.code == 0, self
        assert "Traceback" not in self.err, self
        for word in words:
            assert word in self.out, self

    def wants(self, extra: str) -> None:
        """It said in one line which extra it wants."""
        self.refuses(4, f"pip install 'meerkat-mq[{extra}]'")

    def refuses(self, code: int, *words: str) -> None:
        """It ended with this code and one line that holds these words."""
        assert self.code == code, self
        assert self.out == "", self
        (line,) = self.err.splitlines()
        assert line.startswith("meerkat: "), self
        for word in words:
            assert word in line, self


class Bare:
    """A Python without extras: of a virtual environment made by `make test-wheel`, or a likeness made of links."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.python = python
        self.folder = folder

    @classmethod
    def made_of_links(cls, folder: Path) -> "Bare":
        """Links to the packages that ours needs, and to ours, in a virtual environment of their own."""
        venv.create(folder / "venv", symlinks=True)
        site = next((folder / "venv" / "lib").glob("python*/site-packages"))
        for name in _needed("meerkat-mq"):
            for file in distribution(name).files or ():
                top = file.parts[0]
                if top not in ("..", "__pycache__") and not (site / top).exists():
                    (site / top).symlink_to(str(distribution(name).locate_file(top)))
        (site / "meerkat_mq").symlink_to(Path(meerkat_mq.__file__).parent)
        return cls(folder / "venv" / "bin" / "python", folder)

    @property
    def environment(self) -> dict[str, str]:
        """Nothing leads to the packages of the environment that the tests run in."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        return kept | {"NO_COLOR": "1", "COLUMNS": "200"}

    def run(self, *commands: Sequence[object]) -> list[Said]:
        """Run commands one after the other, in one process: each start costs a second."""
        given = [tuple(map(str, command)) for command in commands]
        done = subprocess.run(
            [self.python, "-c", _DRIVER],
            input=json.dumps(given),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(lines) == len(given), done.stderr
        return [Said(arguments, **line) for arguments, line in zip(given, lines, strict=True)]

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Start a service, as its script would."""
        return subprocess.Popen(
            [self.python, "-m", "meerkat_mq", *map(str, arguments)],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def _needed(name: str, extras: frozenset[str] = frozenset()) -> set[str]:
    """All distributions that one needs, by their markers in this Python."""
    found, waiting = set[str](), [(name, extras)]
    while waiting:
        name, extras = waiting.pop()
        for line in distribution(name).requires or ():
            wanted = Requirement(line)
            if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                key = re.sub(r"[-_.]+", "-", wanted.name).lower()
                if key not in found or wanted.extras:
                    waiting.append((key, frozenset(wanted.extras)))
                found.add(key)
    return found


def interpreter(folder: Path) -> Bare:
    """What MEERKAT_WHEEL_PYTHON names, or one made of links."""
    named = os.environ.get("MEERKAT_WHEEL_PYTHON")
    return Bare(Path(named), folder) if named else Bare.made_of_links(folder)
