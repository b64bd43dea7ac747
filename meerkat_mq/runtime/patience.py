"""What a disk can do to a ledger for a while, and how long a server waits for it."""

import structlog

from meerkat_mq.core.seldom import Seldom
from meerkat_mq.errors import LedgerFailing, LedgerUnavailable

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
FAILING_S = 20.0  # of reading and writing, not of a full disk: then the disk is broken


class Patience:
    """One piece of work that reads or writes the ledger, tried again while its disk cannot take it.

    Args:
        now: seconds, on any clock.
    """

    def __init__(self, now: float) -> None:
        self._began = now
        self._pause_s = FIRST_PAUSE_S
        self._seldom = Seldom()

    def after(self, error: LedgerUnavailable, now: float) -> float:
        """Seconds to wait before the next try.

        Raises:
            LedgerFailing: the disk has given errors for 20 s.
        """
        if isinstance(error, LedgerFailing) and now - self._began > FAILING_S:
            raise error
        self._seldom.say(structlog.get_logger().warning, "ledger not available, trying again", problem=str(error))
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        return pause_s

    def worked(self, now: float) -> None:
        """The work is done."""
        if self._pause_s > FIRST_PAUSE_S:
            structlog.get_logger().info("ledger available again", after_s=round(now - self._began, 1))
