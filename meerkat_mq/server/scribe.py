"""The one writer: carries out, in order and off the loop, what changes the ledger and theta."""

import asyncio
from collections.abc import Callable

from meerkat_mq.core.replica import Replica
from meerkat_mq.rounds import events as e
from meerkat_mq.server.ledger import Ledger

Work = e.CommitSlot | e.CommitUpdate | e.ApplyTerms | e.CommitEntry


class Scribe:
    """Takes the machine's durable effects and answers each with its event."""

    def __init__(self, ledger: Ledger, replica: Replica, tell: Callable[[e.ServerEvent], None]) -> None:
        self._ledger = ledger
        self._replica = replica
        self._tell = tell
        self._queue: asyncio.Queue[Work] = asyncio.Queue()

    def put(self, work: Work) -> None:
        """Queue an effect."""
        self._queue.put_nowait(work)

    async def run(self) -> None:
        """Work until cancelled. Updates that came while the ledger was busy are committed as one group."""
        now = asyncio.get_running_loop().time
        while True:
            waiting = [await self._queue.get()]
            while not self._queue.empty():
                waiting.append(self._queue.get_nowait())
            records = tuple(work.record for work in waiting if isinstance(work, e.CommitUpdate))
            if records:
                await self._ledger.commit_updates(records)
                self._tell(e.UpdatesCommitted(now(), records))
            for work in waiting:
                if not isinstance(work, e.CommitUpdate):
                    await self._carry_out(work)

    async def _carry_out(self, work: e.CommitSlot | e.ApplyTerms | e.CommitEntry) -> None:
        now = asyncio.get_running_loop().time
        match work:
            case e.CommitSlot(node, slot):
                await self._ledger.commit_slot(node, slot)
                self._tell(e.SlotCommitted(now(), node))
            case e.ApplyTerms(version, terms):
                after = await asyncio.to_thread(self._replica.apply, terms)
                self._tell(e.TermsApplied(now(), version, after))
            case e.CommitEntry(entry, records):
                await self._ledger.commit_entry(entry, records)
                self._tell(e.EntryCommitted(now(), entry.version, records))
