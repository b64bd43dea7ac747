"""What a disk can do for a while: a ledger that it does not take waits; what nobody needs is written later."""

from collections import Counter
from collections.abc import Callable

import structlog

from meerkat_mq.core.seldom import Seldom
from meerkat_mq.errors import LedgerError, LedgerFailing, LedgerUnavailable

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
FAILING_S = 20.0  # of reading and writing, not of a full disk: then the disk is broken


class Patience:
    """One piece of work that reads or writes the ledger, tried again while its disk cannot take it."""

    def __init__(self, now: float) -> None:
        self._began = now
        self._pause_s = FIRST_PAUSE_S
        self._seldom = Seldom()

    def after(self, error: LedgerUnavailable, now: float) -> float:
        """Seconds to wait before the next try; raises the error where the disk has given some for 20 s."""
        if isinstance(error, LedgerFailing) and now - self._began > FAILING_S:
            raise error
        self._seldom.say(structlog.get_logger().warning, "ledger not available, trying again", problem=str(error))
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        return pause_s

    def worked(self, now: float) -> None:
        """The work is done."""
        if self._pause_s > FIRST_PAUSE_S:
            structlog.get_logger().info("ledger available again", after_s=round(now - self._began, 1))


class Spare:
    """Writes dispensable files of one process, or of one state folder."""

    def __init__(self) -> None:
        self._seldom = Seldom()
        self._failed: Counter[str] = Counter()

    def write(self, what: str, write: Callable[[], object]) -> bool:
        """Write or remove a file, of the same name in words at every try; False where OSError or LedgerError came."""
        log = structlog.get_logger()
        try:
            write()
        except (OSError, LedgerError) as error:
            problem = error.problem if isinstance(error, LedgerError) else error.strerror
            self._failed[what] += 1
            self._seldom.say(log.warning, "not written, trying again later", what, file=what, problem=problem)
            return False
        if failed := self._failed.pop(what, 0):
            log.info("written again", file=what, failed=failed)
        return True
