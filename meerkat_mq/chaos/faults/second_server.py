"""Two servers that both believe to be in charge."""

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import ClassVar

from meerkat_mq.chaos.faults.fault import Fault, Place
from meerkat_mq.chaos.stage import SERVER, Stage
from meerkat_mq.errors import RunError

PATIENCE_S = 30.0


class SecondServer(Fault):
    """The server stands still, another takes over with --replace on the same ledger, the first one wakes up."""

    name: ClassVar[str] = "second-server"
    on: ClassVar[Place] = "server"
    attachable: ClassVar[bool] = False

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        """Stop the first, start the second; wake the first, which ends in words."""
        first, second = stage.services[SERVER], stage.next_server()
        first.expect_end()
        second.forgiven = True  # a first one that was just starting takes over when it wakes; started again, it wins
        first.signal(signal.SIGSTOP)
        try:
            await second.start()
            yield
        finally:
            first.signal(signal.SIGCONT)
        await first.ends_in_words(RunError.exit_code, within_s=PATIENCE_S)
        second.forgiven = False
