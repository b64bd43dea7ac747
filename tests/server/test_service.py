"""Parts of the server on their own: what is committed when, and what does not fit into the outbox."""

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from meerkat_mq.config import ServerConfig
from meerkat_mq.core.path import Term
from meerkat_mq.core.replica import Replica
from meerkat_mq.core.toy import toy_mask
from meerkat_mq.errors import NotConnected
from meerkat_mq.mqtt import Session
from meerkat_mq.rounds import events as e
from meerkat_mq.server.ledger import MemoryLedger
from meerkat_mq.server.run import prepare_run
from meerkat_mq.server.scribe import Scribe
from meerkat_mq.server.service import _Server
from meerkat_mq.server.watch import Watch
from meerkat_mq.wire.messages import Header, Want
from tests.support.waiting import until


def record(node: str) -> e.UpdateRecord:
    return e.UpdateRecord(0, node, 0, 1, 1, (0.5,), 0.5)


class BusyLedger(MemoryLedger):
    """Takes its time; keeps the sizes of the groups."""

    def __init__(self) -> None:
        super().__init__()
        self.free = asyncio.Event()
        self.groups: list[int] = []

    async def commit_updates(self, records: Sequence[e.UpdateRecord]) -> None:
        self.groups.append(len(records))
        await self.free.wait()
        await super().commit_updates(records)


async def test_updates_that_come_while_the_ledger_is_busy_are_one_group_and_heard_only_then() -> None:
    told: list[e.ServerEvent] = []
    ledger = BusyLedger()
    replica = Replica(toy_mask(10), run_id=bytes(16), stream="mk1", digest_every=1)
    scribe = Scribe(ledger, replica, told.append)
    task = asyncio.create_task(scribe.run())
    scribe.put(e.CommitUpdate(record("a")))
    await until(lambda: ledger.groups)
    for node in ("b", "c"):
        scribe.put(e.CommitUpdate(record(node)))
    scribe.put(e.ApplyTerms(0, (Term(0, 0, 0.5),)))
    assert told == []
    ledger.free.set()
    await until(lambda: len(told) == 3)
    assert ledger.groups == [1, 2]
    assert [record.node for record in ledger.updates] == ["a", "b", "c"]
    assert [type(event) for event in told] == [e.UpdatesCommitted, e.UpdatesCommitted, e.TermsApplied]
    assert replica.version == 1
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_a_reply_that_does_not_fit_into_the_outbox_is_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServerConfig(federation="f", state_dir=tmp_path, engine="toy")
    run = prepare_run(config)
    watch = Watch(lambda event: None, None, 1, run.descriptor)
    server = _Server(config, run, MemoryLedger(), watch, lambda event: None, replace=False)
    sent: list[str] = []

    def publish(session: Session, topic: str, payload: bytes, **options: bool) -> None:
        if sent:
            raise NotConnected(topic, "is full")
        sent.append(topic)

    monkeypatch.setattr(Session, "publish", publish)
    want = Want(Header.of(run.descriptor.run_id, 0, 0, run.mask.hash), 1, blob=run.mask.hash, chunks=(0, 7, 0))
    for _ in range(3):
        server._carry_out(e.SendChunks("node", want))
    assert sent == ["meerkat/v1/f/down/node/reply"]
    assert watch.counts["reply dropped: the outbox is full"] == 2
