"""What must hold of every history, whatever was injected. Pure, and blind to how the machines work."""

import struct
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.gradip import inner_products
from meerkat_mq.core.path import NO_DIGEST, Entry, digest
from meerkat_mq.core.replica import Replica
from meerkat_mq.core.values import mean_displacement, quantised
from meerkat_mq.errors import BadValue, WireError
from meerkat_mq.ledger.displacement import measured
from meerkat_mq.rounds.early_stopping import EarlyStopping, judgements_of
from meerkat_mq.rounds.policy import shares_of, terms_of
from meerkat_mq.rounds.records import Share, UpdateRecord, Verdict
from meerkat_mq.simulate.history import CORRUPT_THETA, History
from meerkat_mq.wire.messages import Header, Round, Update
from meerkat_mq.wire.values import decode_values


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that must hold does not."""

    checker: str
    where: str
    problem: str


Found = Iterator[tuple[str, str]]  # where, problem


def no_update_twice(history: History) -> Found:
    """A node counts once a base version, in one entry, with a value that it sent from that version's theta."""
    sent, counted = _sent(history), defaultdict[tuple[int, str | int], list[int]](list)
    for version, record in _all_records(history):
        for who in (record.node, record.slot):
            counted[record.version, who].append(version)
        found = sent.get(_identity(record.node, record))
        if found and record.version not in {update.header.version for update in found}:
            at = ", ".join(str(update.header.version) for update in found)
            yield f"entry {version}", f"holds an update that {record.node} sent for round {at}"
    for (base, who), versions in counted.items():
        if len(versions) > 1:
            yield f"entry {versions[-1]}", f"holds an update of {who} for round {base}, as entry {versions[0]} does"


def _all_records(history: History) -> Iterator[tuple[int, UpdateRecord]]:
    """Each with its entry; those that are in no entry yet with the next one."""
    for version, records in enumerate(history.all_records):
        yield from ((version, record) for record in records)


def _identity(node: str, sent: Update | UpdateRecord) -> tuple[str, int, bytes]:
    values = (sent.loss, *sent.scalars)  # scalars alone repeat: those of poison, and a toy's, which are coarse
    blob = sent.values.blob if sent.values is not None else b""
    return node, sent.boot, struct.pack(f"<{len(values)}d", *values) + blob


def _sent(history: History) -> Mapping[tuple[str, int, bytes], list[Update]]:
    """The updates of this run by who sent what, NaNs by their bits."""
    mine, sent = _run(history), defaultdict[tuple[str, int, bytes], list[Update]](list)
    for _, node, update in history.updates:
        if update.header.run == mine:
            sent[_identity(node, update)].append(update)
    return sent


def _run(history: History) -> int:
    return Header.of(history.settings.run_id, 0, 0, history.settings.mask_hash).run


def not_too_stale(history: History) -> Found:
    """An update is from theta of its entry's version, or of one that is at most `max_staleness` older."""
    oldest = history.settings.max_staleness
    for version, record in _all_records(history):
        age = version - record.version
        if not 0 <= age <= oldest:
            yield f"entry {version}", f"holds an update of {record.node} for round {record.version}, {age} versions old"


def nothing_lost(history: History) -> Found:
    """What was ever published of the ledger, entries and whose updates are heard, is in the final ledger."""
    kept = {(record.version, record.slot) for _, record in _all_records(history)}
    checked = set[int]()  # by identity: a frame that is said again is mostly the same object, and its hash is dear
    for time, frame in history.rounds:
        if frame.header.run != _run(history) or id(frame) in checked:
            continue
        checked.add(id(frame))
        yield from _entries_lost(history, time, frame)
        version = frame.header.version
        heard = {(version, slot) for slot in frame.heard} | {(version - age, slot) for slot, age in frame.heard_before}
        for base, slot in sorted(heard - kept):
            if not history.undone(time, base + history.settings.max_staleness):
                yield (
                    f"round {base}",
                    f"slot {slot} was heard by {time:.3f} s, but its update is not in the ledger",
                )


def _entries_lost(history: History, time: float, frame: Round) -> Found:
    version, term = frame.header.version, frame.header.term
    if version > len(history.entries) and not history.undone(time, version - 1):
        yield f"entry {version - 1}", f"was published at {time:.3f} s in term {term}, but is not in the ledger"
    for entry in frame.entries:
        known = history.entries[entry.version : entry.version + 1]
        if known and known[0] != entry and not history.undone(time, entry.version):
            yield f"entry {entry.version}", f"is not the one published at {time:.3f} s in term {term}"


def theta_is_the_replay(history: History) -> Found:
    """The entries are a chain with the right digests; nodes claim, and were counted with, no other theta."""
    rules = history.settings
    replica = Replica(history.mask, run_id=rules.run_id, stream=rules.stream, digest_every=rules.digest_every)
    digests, head = {0: digest(replica.theta)}, rules.mask_hash
    for version, entry in enumerate(history.entries):
        after = replica.apply(entry.terms, _displacement(history, entry))
        if (entry.version, entry.previous) != (version, head):
            yield f"entry {version}", "does not extend the one before it"
        if entry.digest != after:
            yield f"entry {version}", f"has digest {entry.digest.hex()}, but the replay gives {after.hex()}"
        if after != NO_DIGEST:
            digests[version + 1] = after
        head = entry.hash(rules.run_id)
    yield from _false_claims(history, digests)
    yield from _counted_from_elsewhere(history, digests)


def _displacement(history: History, entry: Entry) -> Float32Array | None:
    """What an entry's displacement decodes to; None where it has none, or where it is none, which others see."""
    if entry.displacement is None:
        return None
    try:
        return decode_values(
            history.blobs.get(entry.displacement.blob, b""), entry.displacement.blob, history.mask.size
        )
    except WireError:
        return None


def _false_claims(history: History, digests: Mapping[int, bytes]) -> Found:
    undone = _undone_digests(history)
    for time, node, version, claim in history.claims:
        known = {digests.get(version, b""), *undone.get(version, ())}
        if claim not in {whole[: len(claim)] for whole in known} and not _corrupt(history, node, time):
            yield f"node {node}", f"claims at {time:.3f} s a theta of version {version} that the ledger does not give"


def _undone_digests(history: History) -> Mapping[int, set[bytes]]:
    """Digests by version of what was published and then undone by a restore."""
    undone = defaultdict[int, set[bytes]](set)
    for time, frame in history.rounds if history.backups else ():
        for entry in frame.entries:
            if history.undone(time, entry.version):
                undone[entry.version + 1].add(entry.digest)
    return undone


def _corrupt(history: History, node: str, time: float) -> bool:
    return any(
        fault.name == CORRUPT_THETA and fault.target == node and fault.began <= time <= fault.ended
        for fault in history.faults
    )


def _counted_from_elsewhere(history: History, digests: Mapping[int, bytes]) -> Found:
    sent = _sent(history)
    for version, records in enumerate(history.records):
        for record in records:
            base = digests.get(record.version - record.version % history.settings.digest_every, b"")[:8]
            found = sent.get(_identity(record.node, record), ())
            bases = {update.base for update in found if update.header.version == record.version}
            if bases and base not in bases:
                yield f"entry {version}", f"holds an update that {record.node} made from another theta"


def coefficients_recomputable(history: History) -> Found:
    """The stored updates give each entry's terms."""
    if len(history.records) != len(history.entries):
        yield "ledger", f"{len(history.entries)} entries, but updates for {len(history.records)}"
    for entry, records in zip(history.entries, history.records, strict=False):
        try:
            terms = terms_of(records, history.settings, entry.version)
        except BadValue as error:
            yield f"entry {entry.version}", f"its stored updates cannot be added ({error})"
            continue
        if entry.terms != terms:
            yield f"entry {entry.version}", "its coefficients are not those of the stored updates"


def displacements_recomputable(history: History) -> Found:
    """The stored displacements of values nodes give each entry's, and there is none without them."""
    for entry, records in zip(history.entries, history.records, strict=False):
        shares = shares_of(records, history.settings, entry.version)
        if bool(shares) != (entry.displacement is not None):
            yield f"entry {entry.version}", f"has {'no' if shares else 'a'} displacement, against its stored updates"
        elif entry.displacement is not None and (problem := _wrong_mean(history, entry, records, shares)):
            yield f"entry {entry.version}", problem


def _wrong_mean(history: History, entry: Entry, records: Sequence[UpdateRecord], shares: Sequence[Share]) -> str | None:
    size, found = history.mask.size, _displacement(history, entry)

    def load(blob: bytes) -> Float32Array:
        return decode_values(history.blobs[blob], blob, size)

    try:
        if measured(records, load, history.settings) != tuple(records):
            return "its displacements are not what they were measured to be"
        parts = [(share.weight, load(share.blob)) for share in shares]
        mean = quantised(mean_displacement(parts, size), history.settings.values.codec)
    except (KeyError, WireError, BadValue):
        return "lacks a displacement of its stored updates"
    if found is None or found.tobytes() != mean.tobytes():
        return "its displacement is not the mean of its stored updates'"
    return None


def as_asked(history: History) -> Found:
    """An update has as many scalars as its round asked of its node, by what was known of it before.

    Of a buffered run, that many or those of fewer whole steps; of an older version, which asked when less was known,
    at most those of any node. A displacement has none.
    """
    settings, early = history.settings, EarlyStopping(history.settings)
    for version, records in enumerate(history.all_records):
        for record in records:
            present = record.version == version
            steps = early.steps_of(version, record.node) if present else settings.steps_of(record.version)
            asked, found = settings.perturbations * steps, len(record.scalars)
            part = settings.buffered and 0 < found < asked and found % settings.perturbations == 0
            if found != asked and not part and record.values is None:
                yield f"entry {version}", f"asked {record.node} for {asked} scalars, and holds {found}"
            elif found and record.values is not None:
                yield f"entry {version}", f"holds scalars and a displacement of {record.node}"
        early.remember(judgement for found in history.judgements[version : version + 1] for judgement in found)


def judgements_recomputable(history: History) -> Found:
    """Seeds and g_p give the inner products; these and the updates, who is early-stopped; and its updates say so."""
    settings, g_p = history.settings, history.mask.g_p
    for what, kept in (("inner products", history.products), ("judgements", history.judgements)):
        if len(kept) != len(history.entries):
            yield "ledger", f"{len(history.entries)} entries, but {what} for {len(kept)}"
    ledger = zip(history.records, history.products, history.judgements, strict=False)
    for version, (records, products, judgements) in enumerate(ledger):
        steps, lanes = settings.scalars_of(version), settings.directions if settings.measured else 0
        measured = inner_products(g_p, settings.run_id, version, lanes=lanes, steps=steps, stream=settings.stream)
        if products != measured:
            yield f"entry {version}", "its inner products are not those of its directions"
        elif judgements != judgements_of(version, records, products, settings):
            yield f"entry {version}", "its judgements are not those of the stored paths"
        stopped = {(version, judgement.node) for judgement in judgements if judgement.early_stopped}
        if stopped != {(r.version, r.node) for r in records if r.verdict is Verdict.EARLY_STOPPED}:
            yield f"entry {version}", "its updates are not marked as its judgements say"


def one_writer(history: History) -> Found:
    """A term belongs to one server, and the ledger was written in the order of the terms."""
    owners = dict(history.terms)
    for (earlier, _), (later, _) in pairwise(history.terms):
        if later <= earlier:
            yield f"term {later}", f"was taken after term {earlier}"
    for version, term in enumerate(history.entry_terms):
        if term not in owners:
            yield f"entry {version}", f"was written in term {term}, which nobody took"
    for version, (earlier, later) in enumerate(pairwise(history.entry_terms), 1):
        if later < earlier:
            yield f"entry {version}", f"was written in term {later}, after one of term {earlier}"
    yield from _two_servers(history, owners)


def _two_servers(history: History, owners: Mapping[int, str]) -> Found:
    """By what servers say; a restored ledger has forgotten who took a term after the backup."""
    speakers = defaultdict[tuple[int, int], set[str]](set)
    for time, state in history.states:
        if state.run == history.settings.run_id.hex() and state.connected:
            restores = sum(restored < time for restored, _ in history.backups)
            speakers[state.term, restores].add(state.server_id)
    for (term, restores), heard in sorted(speakers.items()):
        final = restores == len(history.backups)
        servers = sorted(heard | {owners[term]} if final and term in owners else heard)
        if len(servers) > 1:
            yield f"term {term}", f"belongs to servers {' and '.join(servers)}"
        elif final and term not in owners:
            yield f"term {term}", "is not in the ledger"


def finishes(history: History) -> Found:
    """Once all faults have healed, or what never heals leaves a live quorum, the run comes to its end."""
    if not history.finished or len(history.entries) != history.settings.count:
        why = f": {history.stuck}" if history.stuck else ""
        yield "run", f"stands at version {len(history.entries)} of {history.settings.count}{why}"


CHECKERS: dict[str, Callable[[History], Found]] = {
    "no update applied twice": no_update_twice,
    "no update too stale": not_too_stale,
    "no committed round lost or changed": nothing_lost,
    "theta is the replay of the ledger": theta_is_the_replay,
    "coefficients recomputable": coefficients_recomputable,
    "displacements recomputable": displacements_recomputable,
    "as many scalars as asked": as_asked,
    "judgements recomputable": judgements_recomputable,
    "one writer a term": one_writer,
    "a live quorum finishes": finishes,
}


def check(history: History) -> dict[str, list[Violation]]:
    """What each checker finds; empty lists where all holds."""
    return {name: [Violation(name, *found) for found in find(history)] for name, find in CHECKERS.items()}
