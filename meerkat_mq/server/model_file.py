"""`difference.mkd`: what a server leaves of its run, the model as the ledger says."""

import asyncio
from pathlib import Path

import structlog

from meerkat_mq.errors import ConfigError, LedgerUnavailable
from meerkat_mq.ledger.files import DIFFERENCE_FILE
from meerkat_mq.ledger.run import Run
from meerkat_mq.server.scribe import Scribe
from meerkat_mq.wire.difference import Difference

AGAIN_S = 2.0
ONCE_S = 60.0  # of a server that ends with its run


class ModelFile:
    """Writes the file, where this server is in charge; what cannot be written is tried again."""

    def __init__(self, folder: Path, run: Run, scribe: Scribe) -> None:
        self._path = folder / DIFFERENCE_FILE
        self._run = run
        self._scribe = scribe
        self._version = 0

    async def leave(self) -> bool:
        """Write it once, unless no round closed since; whether it lies there, or is another server's.

        Raises:
            LedgerError: the ledger cannot tell who is in charge.
        """
        lies_there = [True]
        await self._scribe.in_charge(lambda: lies_there.append(self._write()))
        return lies_there[-1]

    async def complete(self, *, once: bool) -> None:
        """Write it at the end of a run, however long that takes, or, in a server that ends with its run, for a minute.

        Raises:
            ConfigError: in that minute the disk did not take it.
            LedgerError: as `leave`.
        """
        gives_up = asyncio.get_running_loop().time() + ONCE_S
        while not await self._left():
            if once and asyncio.get_running_loop().time() > gives_up:
                raise ConfigError(str(self._path), "cannot be written", "free space, and start the server again")
            await asyncio.sleep(AGAIN_S)
        structlog.get_logger().info("model saved", file=str(self._path))

    async def _left(self) -> bool:
        try:
            return await self.leave()
        except LedgerUnavailable:
            return False

    def _write(self) -> bool:
        version, theta = self._scribe.committed
        if version == self._version:
            return True
        difference = Difference(self._run.mask, theta, self._run.descriptor.run_id, version)
        if not self._scribe.spare.write(DIFFERENCE_FILE, lambda: difference.save(self._path)):
            return False
        self._version = version
        return True
