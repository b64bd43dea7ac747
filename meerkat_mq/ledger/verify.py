"""Verification: the model is what mask and ledger say. Nothing here knows how the server came to it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.gradip import inner_products
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import MAX_WEIGHT, Coefficient, Entry, digest
from meerkat_mq.core.replica import Replica
from meerkat_mq.core.values import quantised
from meerkat_mq.errors import LedgerError, MeerkatError, RunMismatch, WireError
from meerkat_mq.ledger.chain import ALTERED, check_chain
from meerkat_mq.ledger.displacement import mean_of, measured, verdict_on
from meerkat_mq.ledger.run import max_step_of, settings_of
from meerkat_mq.ledger.store import KeptSnapshot, Products, Store
from meerkat_mq.rounds.early_stopping import EarlyStopping, judgements_of, with_verdicts
from meerkat_mq.rounds.guards import Guard, on_arrival
from meerkat_mq.rounds.policy import RoundSettings, shares_of, steps_fit, terms_of
from meerkat_mq.rounds.records import JUDGED, Judgement, Moved, Share, UpdateRecord, Verdict
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.messages import in_words
from meerkat_mq.wire.snapshot import decode_snapshot

Look = Callable[[Float32Array, bytes], None]  # takes theta of a version, and the hash of the entry before it
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Verified:
    """What holds."""

    rounds: int
    updates: int  # those that the entries are made of, refused ones too
    digest: bytes  # of theta after the last entry
    files: tuple[str, ...] = ()  # names of what else was compared
    chain: bytes | None = None  # hash of the newest link of the ledger's own chain; None: servers wrote it without one


def verify_ledger(
    ledger: Store,
    mask: Mask,
    progress: Progress = lambda done, total: None,
    looks: Mapping[int, Sequence[Look]] | None = None,
) -> Verified:
    """Rebuild theta entry by entry, and recompute all that an entry says. Memory does not grow with the ledger.

    Where the run measures GradIP, so are the products and what they show of nodes: each direction is drawn twice.

    A server may write on meanwhile: the entries present at the start are verified.

    Args:
        progress: is told how many entries are done, of how many.
        looks: by version, who wants to see theta there.

    Raises:
        RunMismatch: names the first entry that does not hold, or after which theta is not finite, and what is wrong
            with it; or a judgement of no entry; or what else is not as it was committed (`chain`).
    """
    run = run_of(ledger)
    g_p = mask.g_p
    settings = settings_of(run, ledger.rules, measured=bool(g_p.any()))
    check_mask(mask, run)
    if run.max_step is not None:
        _same("max_step", run.max_step, max_step_of(ledger.rules, mask), "its rules and mask give")
    replica = Replica(mask, run_id=run.run_id, stream=run.stream, digest_every=run.digest_every)
    early, kept, compared = EarlyStopping(settings), False, False
    guard = Guard(settings.guards, settings.directions, cumulative=True) if settings.clips else None
    head, term, updates = mask.hash, 0, 0
    rounds = ledger.version
    for version in range(rounds + 1):
        for look in (looks or {}).get(version, ()):
            look(replica.theta, head)
        progress(version, rounds)
        if version < rounds:
            with _entry(version):
                entry, term = _entry_at(ledger, version, head, term)
                records = ledger.records(version)
                _check_records(records, version, settings, early)
                _check_values(ledger, records, settings, mask.size)
                compared = _check_moved(ledger, records, settings, mask.size, before=compared)
                products = ledger.products(version, settings)
                if products is not None or kept or settings.calibrates(version):  # else older than schema 2
                    kept = True
                    _check_products(products, version, g_p, run.stream, settings)
                judgements = ledger.judgements(version)
                _check_judgements(judgements, version, records, products or (), settings)
                early.remember(judgements)
                if guard is not None:  # verdicts of older runs depend on keys that were not fixed
                    _check_guard(guard, records, judgements)
                _check_terms(entry.terms, terms_of(records, settings, version))
                added = _displacement(ledger, entry, shares_of(records, settings, version), settings, mask.size)
                _same("digest", entry.digest.hex(), replica.apply(entry.terms, added).hex(), "its terms give")
            head, updates = entry.hash(run.run_id), updates + len(records)
    if (judged := ledger.judged_while_open()) is not None:
        raise RunMismatch(f"round {judged!r:.50}", "has judgements, but did not close", ALTERED)
    if (astray := ledger.astray()) is not None:
        raise RunMismatch(f"version {astray!r:.50}", "an update from its theta is in no entry where it can be", ALTERED)
    chain = None if ledger.chain is None else check_chain(ledger.chain)
    return Verified(rounds, updates, digest(replica.theta), chain=chain)


def run_of(ledger: Store) -> RunDescriptor:
    """The run that a ledger is of; LedgerError where none was begun."""
    run = ledger.run
    if run is None:
        remedy = "start its server, unless this is a copy without its -wal file: then copy both"
        raise LedgerError(ledger.where, "holds no run yet", remedy)
    return run


@contextmanager
def _entry(version: int) -> Iterator[None]:
    """Any error inside is one of this entry."""
    try:
        yield
    except RunMismatch as error:
        raise RunMismatch(f"entry {version}", error.problem, ALTERED) from error
    except MeerkatError as error:
        raise RunMismatch(f"entry {version}", f"{error.where} {error.problem}", ALTERED) from error


def _same(what: str, found: object, expected: object, by: str) -> None:
    if found != expected:
        raise RunMismatch(what, f"its {what} is {found}; {by} {expected}")


def _entry_at(ledger: Store, version: int, head: bytes, term: int) -> tuple[Entry, int]:
    """The entry that extends `head`, and the term under which it was written."""
    found = ledger.closed(version, 1)
    if not found:
        raise RunMismatch("entry", "is missing")
    entry = found[0].entry
    if entry.version != version:
        raise RunMismatch("entry", f"is missing; entry {entry.version} stands in its place")
    _same("previous", entry.previous.hex(), head.hex(), "the hash of the one before it is")
    if found[0].term < term:
        raise RunMismatch("entry", f"was written under term {found[0].term}, after one of term {term}")
    return entry, found[0].term


def _check_records(
    records: Sequence[UpdateRecord], version: int, settings: RoundSettings, early: EarlyStopping
) -> None:
    if len({(record.version, record.node) for record in records}) < len(records):
        raise RunMismatch("updates", "a node is in its updates twice")
    for record in records:
        where = f"its update of {record.node}"
        if not 1 <= record.weight <= MAX_WEIGHT:
            raise RunMismatch("updates", f"{where} weighs {record.weight}")
        if record.values is not None:
            continue
        # who was early-stopped when an older version was open may not be now
        steps = early.steps_of(version, record.node) if record.version == version else settings.steps_of(record.version)
        if not steps_fit(len(record.scalars), steps, settings):
            asked = settings.perturbations * steps
            problem = f"{where} has {len(record.scalars)} projected gradients, but was asked for {asked}"
            raise RunMismatch("updates", problem)
        _check_verdict(record, on_arrival(record.scalars, record.loss, settings.lr, settings.max_step))


def _check_verdict(record: UpdateRecord, verdict: Verdict) -> None:
    """That it is kept as what can be said of it alone, or as what only other updates show."""
    if verdict is not record.verdict and not {verdict, record.verdict} <= JUDGED:
        problem = f"its update of {record.node} is kept as {in_words(record.verdict)}, but is {in_words(verdict)}"
        raise RunMismatch("updates", problem)


def _check_values(ledger: Store, records: Sequence[UpdateRecord], settings: RoundSettings, weights: int) -> None:
    for record in records:
        if record.values is None:
            continue
        if not settings.values.accept:
            raise RunMismatch("updates", f"its update of {record.node} is a displacement; this run takes none")
        found = ledger.values(record.values.blob, weights)
        _check_size(ledger.blob(record.values.blob), record.values.size)
        _check_verdict(record, verdict_on(found, record.loss, settings.reach(record.values.steps)))


def _check_moved(
    ledger: Store, records: Sequence[UpdateRecord], settings: RoundSettings, weights: int, *, before: bool
) -> bool:
    """That displacements are what they were measured to be; whether they are measured, as older servers did not."""
    if not (before or any(record.moved for record in records)):
        return False
    load = partial(ledger.values, weights=weights)
    for record, true in zip(records, measured(records, load, settings), strict=True):
        found, recomputed = _moved_words(record.moved), _moved_words(true.moved)
        _same(f"measure of {record.node}'s displacement", found, recomputed, "it is")
    return True


def _moved_words(moved: Moved | None) -> str:
    if moved is None:
        return "none"
    along = ", ".join(f"{x:.9g}" for x in moved.along)
    return f"size {moved.size:.9g}, agreement {moved.agreement:.9g}, along {along}"


def _check_size(blob: bytes | None, size: int) -> None:
    _same("displacement", f"of {len(blob or b'')} bytes", f"of {size} bytes", "it is said to be")


def _displacement(
    ledger: Store, entry: Entry, shares: Sequence[Share], settings: RoundSettings, weights: int
) -> Float32Array | None:
    """What the entry's displacement decodes to, which is what its updates give."""
    added = entry.displacement
    if added is None or not shares:
        _same("displacement", "none" if added is None else "one", "one" if shares else "none", "its updates give")
        return None
    _check_size(ledger.displacement(added.blob), added.size)
    found = ledger.values(added.blob, weights)
    if found.tobytes() != quantised(mean_of(shares, ledger, weights), settings.values.codec).tobytes():
        raise RunMismatch("displacement", "its displacement is not the mean of its updates'")
    return found


def _check_products(
    found: Products | None, version: int, g_p: Float32Array, stream: str, settings: RoundSettings
) -> None:
    expected: Products = ()
    if settings.measured:
        lanes, steps = settings.directions, settings.scalars_of(version)
        expected = inner_products(g_p, settings.run_id, version, lanes=lanes, steps=steps, stream=stream)
    if found is None or [len(lane) for lane in found] != [len(lane) for lane in expected]:
        size = "no products" if found is None else f"products of {sum(map(len, found))} directions"
        raise RunMismatch("products", f"it has {size}; the mask gives those of {sum(map(len, expected))}")
    for lane, (products, recomputed) in enumerate(zip(found, expected, strict=True)):
        for step, (product, true) in enumerate(zip(products, recomputed, strict=True)):
            _same(f"product of lane {lane}, step {step}", product, true, "the mask gives")


def _check_judgements(
    found: Sequence[Judgement],
    version: int,
    records: Sequence[UpdateRecord],
    products: Products,
    settings: RoundSettings,
) -> None:
    """That they, and the verdicts that follow, are what the updates of the round show."""
    judged = [
        replace(record, verdict=Verdict.ACCEPTED) if record.verdict is Verdict.EARLY_STOPPED else record
        for record in records
    ]
    expected = judgements_of(version, judged, products, settings)
    for judgement, recomputed in zip_longest(found, expected):
        _same("judgement", _judgement_words(judgement), _judgement_words(recomputed), "its updates give")
    for record, true in zip(records, with_verdicts(judged, expected), strict=True):
        if record.verdict is not true.verdict:
            problem = f"its update of {record.node} is kept as {in_words(record.verdict)}, but is"
            raise RunMismatch("updates", f"{problem} {in_words(true.verdict)}")


def _check_guard(guard: Guard, records: Sequence[UpdateRecord], judgements: Sequence[Judgement]) -> None:
    """That the verdicts are those that the window gives; the guard then remembers the round."""
    came = [replace(one, verdict=Verdict.ACCEPTED) if one.verdict in JUDGED else one for one in records]
    for record, true in zip(records, with_verdicts(guard.judge(came), judgements), strict=True):
        if record.verdict is not true.verdict:
            problem = f"its update of {record.node} is kept as {in_words(record.verdict)}, but is"
            raise RunMismatch("updates", f"{problem} {in_words(true.verdict)}")
    guard.remember(records)


def _judgement_words(judgement: Judgement | None) -> str:
    if judgement is None:
        return "none"
    verdict = "early-stopped" if judgement.early_stopped else "not early-stopped"
    return f"{judgement.node} {verdict}, rho_later {judgement.rho_later!r}, rho_quiet {judgement.rho_quiet!r}"


def _check_terms(found: Sequence[Coefficient], expected: Sequence[Coefficient]) -> None:
    for index, (term, recomputed) in enumerate(zip_longest(found, expected)):
        _same(f"term {index}", _words(term), _words(recomputed), "its updates give")


def _words(term: Coefficient | None) -> str:
    if term is None:
        return "none"
    age = f"age {term.age}, " if term.age else ""
    return f"{age}lane {term.lane}, step {term.step}, coefficient {term.coefficient:.9g}"


def check_mask(mask: Mask, run: RunDescriptor) -> None:
    """Refuse, as RunMismatch, the mask of another run."""
    if mask.hash != run.mask_hash:
        raise RunMismatch("mask", f"has hash {mask.hash.hex()}, the run's is {run.mask}", "give the run's mask file")


def snapshot_look(ledger: Store, kept: KeptSnapshot, run: RunDescriptor, files: list[str]) -> Look:
    """Adds its name to `files`; one that is lost, or that a running server has replaced meanwhile, is passed over."""

    name = ledger.snapshot_name(kept.version)

    def look(theta: Float32Array, head: bytes) -> None:
        try:
            blob = ledger.snapshot(kept)
            if blob is None:
                return
            found = decode_snapshot(blob, kept.hash, run.weights)
        except LedgerError as error:
            raise RunMismatch(name, error.problem, ALTERED) from error
        except WireError as error:
            raise RunMismatch(name, f"{error.where} {error.problem}", ALTERED) from error
        if (found.run_id, found.version, found.head) != (run.run_id, kept.version, head):
            raise RunMismatch(name, f"is not of this run's version {kept.version}", ALTERED)
        compare(name, digest(found.theta), kept.version, theta)
        files.append(Path(name).name)

    return look


def compare(file: str, found: bytes, version: int, theta: Float32Array) -> None:
    """Refuse a file whose theta is not the ledger's of that version."""
    expected = digest(theta)
    if found != expected:
        problem = f"holds a theta of digest {found.hex()}; the ledger's of version {version} has {expected.hex()}"
        raise RunMismatch(file, problem, ALTERED)
