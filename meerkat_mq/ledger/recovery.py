"""Resuming: what the ledger holds becomes theta and a machine that goes on."""

import time

import structlog

from meerkat_mq.core.path import NO_DIGEST, Entry, digest
from meerkat_mq.core.replica import Replica
from meerkat_mq.errors import LedgerError
from meerkat_mq.ledger.run import Run
from meerkat_mq.ledger.snapshots import DAMAGED, Snapshots
from meerkat_mq.ledger.store import Store
from meerkat_mq.rounds.policy import ROUND_ENTRY_BYTES
from meerkat_mq.rounds.server import ServerMachine

AT_ONCE = 100
SAY_EVERY_S = 2.0
NEWEST = ROUND_ENTRY_BYTES // 38  # an entry without terms has 38 bytes


def recovered(ledger: Store, run: Run, snapshots: Snapshots, replica: Replica | None = None) -> Replica:
    """theta as the ledger says: the newest whole snapshot, or theta_0, and the entries since; every digest checked.

    Args:
        replica: at theta_0; led on to the ledger's version. Default: a new one.

    Raises:
        LedgerError: an entry does not extend the one before it, or does not lead to its digest.
    """
    of = run.descriptor
    replica = replica or Replica(run.mask, run_id=of.run_id, stream=of.stream, digest_every=of.digest_every)
    snapshot = snapshots.newest()
    if snapshot is not None:
        replica.load(snapshot.theta, snapshot.version)
    follow(ledger, run, replica)
    return replica


def follow(ledger: Store, run: Run, replica: Replica) -> None:
    """Lead theta, which is the ledger's of some version, on to where the ledger stands; every digest checked.

    Raises:
        LedgerError: an entry does not extend the one before it, or does not lead to its digest.
    """
    log, version = structlog.get_logger().bind(file=ledger.where), ledger.version
    say_at = time.monotonic() + SAY_EVERY_S
    before = ledger.entries(replica.version - 1, 1) if replica.version else ()
    head = before[0].hash(run.descriptor.run_id) if before else run.mask.hash
    while replica.version < version:
        entries = ledger.entries(replica.version, AT_ONCE)
        digests = replica.replay(ledger.changes(entries, run.mask.size))
        for entry, found in zip(entries, digests, strict=True):
            if entry.previous != head or entry.digest != found:
                problem = f"entry {entry.version} does not follow from those before it"
                remedy = "restore the ledger from a backup; `meerkat verify` says more"
                raise LedgerError(ledger.where, problem, remedy)
            head = entry.hash(run.descriptor.run_id)
        if time.monotonic() >= say_at:
            say_at = time.monotonic() + SAY_EVERY_S
            log.info("replaying the ledger", version=replica.version, of=version)


def resumed(ledger: Store, run: Run, *, term: int, server_id: str) -> ServerMachine:
    """A machine that goes on where the ledger stands, the committed updates that no entry holds yet included."""
    version = ledger.version
    bases = _bases(ledger, run, version)
    entries = _unbroken(ledger, run, max(0, version - NEWEST))
    return ServerMachine(
        run.settings,
        term=term,
        server_id=server_id,
        base=bases[version],
        version=version,
        head=entries[-1].hash(run.descriptor.run_id) if entries else None,
        slots=ledger.slots(),
        entries=entries,
        updates=ledger.open_updates(),
        past=ledger.past(run.settings.guards.window),
        judgements=ledger.newest_judgements(),
        bases=bases,
        heard=ledger.heard(),
    )


def _unbroken(ledger: Store, run: Run, first: int) -> tuple[Entry, ...]:
    """The entries from a version on; where an older one was damaged since a snapshot took it in, those after it."""
    entries = ledger.entries(first, ledger.version - first)
    for number in range(len(entries) - 1, 0, -1):
        if entries[number].previous != entries[number - 1].hash(run.descriptor.run_id):
            structlog.get_logger().warning(DAMAGED, file=ledger.where, entry=entries[number - 1].version)
            return entries[number:]
    return entries


def _bases(ledger: Store, run: Run, version: int) -> dict[int, bytes]:
    """By version that an update's theta may be of, the newest due digest at or before it, as far as that is known.

    Raises:
        LedgerError: that of the newest version is not known, since the entry that says it was damaged.
    """
    versions = range(max(0, version - run.descriptor.max_staleness), version + 1)
    due = {found: found - found % run.descriptor.digest_every for found in versions}
    digests = {entry.version + 1: entry.digest for entry in _unbroken(ledger, run, max(0, min(due.values()) - 1))}
    digests[0] = digest(run.mask.theta_0)
    if due[version] not in digests:
        raise LedgerError(ledger.where, f"entry {due[version] - 1} is damaged", "restore the ledger from a backup")
    assert all(digests.get(at) != NO_DIGEST for at in due.values())
    return {found: digests[at] for found, at in due.items() if at in digests}
