"""Files that nobody needs in order to go on: one that cannot be written is said, counted, and tried again later."""

from collections import Counter
from collections.abc import Callable

import structlog

from meerkat_mq.core.seldom import Seldom
from meerkat_mq.errors import LedgerError


class Spare:
    """Writes dispensable files of one process, or of one state folder."""

    def __init__(self) -> None:
        self._seldom = Seldom()
        self._failed: Counter[str] = Counter()

    def write(self, what: str, write: Callable[[], object]) -> bool:
        """Write a file, or remove one; whether that was possible.

        Args:
            what: the file, in words; the same at every try.
            write: raises OSError or LedgerError where the disk cannot take it.
        """
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
