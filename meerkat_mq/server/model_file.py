"""`difference.mkd`: what a server leaves of its run, the model as the ledger says."""

import asyncio
from concurrent.futures import Executor
from pathlib import Path

import structlog

from meerkat_mq.errors import ConfigError, LedgerUnavailable
from meerkat_mq.ledger.files import DIFFERENCE_FILE
from meerkat_mq.runtime.spare import Spare
from meerkat_mq.runtime.writer import Holdings, LedgerWriter
from meerkat_mq.wire.difference import Difference

AGAIN_S = 2.0
ONCE_S = 60.0  # of a server that ends with its run


class ModelFile:
    """Writes the file, where this server is in charge; what cannot be written is tried again."""

    def __init__(self, folder: Path, held: Holdings, writer: LedgerWriter, worker: Executor) -> None:
        self._path = folder / DIFFERENCE_FILE
        self._held = held
        self._writer = writer
        self._worker = worker
        self._spare = Spare()
        self._version = 0

    async def leave(self) -> bool:
        """Write it once, unless no round closed since; whether it lies there, or is another server's.

        Raises:
            LedgerError: the ledger cannot tell who is in charge.
        """
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._write)

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
        if not self._held.ledger.in_charge:
            return True
        version, theta = self._writer.committed
        if version == self._version:
            return True
        run = self._held.run
        difference = Difference(run.mask, theta, run.descriptor.run_id, version)
        if not self._spare.write(DIFFERENCE_FILE, lambda: difference.save(self._path)):
            return False
        self._version = version
        return True
