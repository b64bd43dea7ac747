"""Processes of modules, forked from one that has imported what they need: an import costs half a second of CPU.

What `python -m` itself does, from its first line on, the tests of signals, drills and the wheel see.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["meerkat_mq.server.__main__", "meerkat_mq.node.__main__", "meerkat_mq.engines.toy"])


class Forked:
    """`python -m MODULE ARGUMENTS`, its output in a file; `environment` is all that it has."""

    def __init__(self, module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        log.write_bytes(b"")  # before anybody reads what an earlier one left
        given = (module, list(arguments), str(log), dict(environment))
        self._process = _FORKS.Process(target=_run, args=given, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it is over."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL; it is over at the return."""
        self._process.kill()
        self._process.join()


def _run(module: str, arguments: list[str], log: str, environment: dict[str, str]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(file, standard)
    os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = [module, *arguments]
    sys.modules.pop(f"{module}.__main__", None)  # imported ahead under its own name; its last line counts now
    runpy.run_module(module, run_name="__main__", alter_sys=True)
