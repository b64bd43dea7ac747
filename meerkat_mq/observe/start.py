"""The first thing that a process of ours does, before it imports anything that takes long: even `signal` does.

`python -m` runs a package before its `__main__`: those of services are empty, for signals would wait for their imports.
"""

import _signal  # type: ignore[import-not-found]  # typeshed knows the public one only
import os

WORDS: dict[int, str] = {_signal.SIGINT: "Interrupted", _signal.SIGTERM: "Terminated"}
SIGNALLED = 128  # + a signal's number: the exit code of what it ended


def start() -> None:
    """Signals and standard streams are ours from here on."""
    for number in WORDS:
        _signal.signal(number, _leave)
    from meerkat_mq.observe import signals, streams  # noqa: PLC0415

    streams.guard_standard_streams()
    signals.listen()


def _leave(number: int, _: object) -> None:
    try:
        os.write(2, f"{WORDS[number]}\n".encode())
    finally:
        os._exit(SIGNALLED + number)
