"""`python -m tests.server.killed`: a server that kills itself just before or after a write, as MEERKAT_KILL says.

"commit_entry before 3": before the third call of that method in this process.
"""

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import typer

from meerkat_mq.ledger import files, sqlite_file
from meerkat_mq.ledger.sqlite import Ledger
from meerkat_mq.server.__main__ import command
from meerkat_mq.wire import snapshot

POINTS: dict[str, tuple[Any, str]] = {
    "make": (sqlite_file, "_name"),
    "begin": (Ledger, "begin"),
    "term": (Ledger, "take_term"),
    "slot": (Ledger, "commit_slot"),
    "updates": (Ledger, "commit_updates"),
    "blob": (Ledger, "keep_blob"),
    "entry": (Ledger, "commit_entry"),
    "sightings": (Ledger, "commit_sightings"),
    "snapshot row": (Ledger, "_commit_snapshot"),
    "snapshot file": (files, "write_atomically"),
    "difference": (snapshot, "write_atomically"),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(call: Callable[..., Any], when: str, number: int) -> Callable[..., Any]:
    """The same call, whose n-th is the last thing that this process does, or almost does."""
    calls = itertools.count(1)

    def called(*args: Any, **options: Any) -> Any:
        last = next(calls) == number
        if last and when == "before":
            die()
        result = call(*args, **options)
        if last:
            die()
        return result

    return called


def dying_group(group: Callable[[Ledger], Any], when: str, number: int) -> Callable[[Ledger], Any]:
    """`Ledger.group`, whose n-th transaction is the last: before its first statement, or after COMMIT."""
    calls = itertools.count(1)

    @contextlib.contextmanager
    def called(ledger: Ledger) -> Iterator[None]:
        last = not ledger._connection.in_transaction and next(calls) == number
        if last and when == "before":
            die()
        with group(ledger):
            yield
        if last:
            die()

    return called


def plant(point: str, when: str, number: int) -> None:
    if point == "group":
        setattr(Ledger, point, dying_group(Ledger.group, when, number))
    else:
        owner, name = POINTS[point]
        setattr(owner, name, dying(getattr(owner, name), when, number))


if __name__ == "__main__":
    what, when, number = os.environ["MEERKAT_KILL"].rsplit(" ", 2)
    plant(what, when, int(number))
    typer.run(command)
