"""Two processes with one node id."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import ClassVar

from meerkat_mq.chaos.faults.fault import Fault, Place
from meerkat_mq.chaos.stage import Stage
from meerkat_mq.errors import RunError

PATIENCE_S = 30.0


class Clone(Fault):
    """A second process with the same id, as from a copied card: the first ends in words, the second works on."""

    name: ClassVar[str] = "clone"
    on: ClassVar[Place] = "node"
    attachable: ClassVar[bool] = False

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        """Start the second, await the first one's end; stop the second, start the first."""
        first = stage.services[target]
        second = stage.clone_of(target)
        first.expect_end()
        second.forgiven = True  # a first one that was just starting is the newer one; started again, the second wins
        await second.start()
        try:
            await first.ends_in_words(RunError.exit_code, within_s=PATIENCE_S)
            yield
        finally:
            await second.stop()
        await first.start()
