"""Verification: the model is what mask and ledger say. Nothing here knows how the server came to it."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from meerkat_mq.config import Codec
from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.gradip import inner_products
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import MAX_WEIGHT, Entry, Term, digest
from meerkat_mq.core.replica import Replica
from meerkat_mq.core.values import quantised
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.errors import LedgerError, MaskError, MeerkatError, ModelError, RunMismatch, WireError
from meerkat_mq.extras import importing, need
from meerkat_mq.ledger.displacement import mean_of, verdict_on
from meerkat_mq.ledger.files import DIFFERENCE_FILE, mask_file, snapshot_file
from meerkat_mq.ledger.remains import check_remains
from meerkat_mq.ledger.rows import KeptSnapshot, Products
from meerkat_mq.ledger.run import codec_of, max_step_of, settings_of
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.rounds.early_stopping import EarlyStopping, judgements_of, with_verdicts
from meerkat_mq.rounds.guards import on_arrival
from meerkat_mq.rounds.policy import RoundSettings, shares_of, steps_fit, terms_of
from meerkat_mq.rounds.records import Judgement, Share, UpdateRecord, Verdict
from meerkat_mq.wire.descriptor import RunDescriptor, Task
from meerkat_mq.wire.difference import Difference
from meerkat_mq.wire.messages import in_words
from meerkat_mq.wire.snapshot import decode_snapshot

ALTERED = "it was altered or damaged after it was written: restore a backup"
# by other updates, or by the path; the rest shows in the update alone
JUDGED = {Verdict.ACCEPTED, Verdict.OUTLIER, Verdict.AGAINST, Verdict.EARLY_STOPPED}

Look = Callable[[Float32Array, bytes], None]  # takes theta of a version, and the hash of the entry before it
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Verified:
    """What holds.

    Attributes:
        rounds: entries.
        updates: those that the entries are made of, refused ones too.
        digest: of theta after the last entry.
        files: names of what else was compared.
    """

    rounds: int
    updates: int
    digest: bytes
    files: tuple[str, ...] = ()


def verify_ledger(
    ledger: Ledger,
    mask: Mask,
    progress: Progress = lambda done, total: None,
    looks: Mapping[int, Sequence[Look]] | None = None,
) -> Verified:
    """Rebuild theta entry by entry, and recompute all that an entry says. Memory does not grow with the ledger.

    Where the run measures GradIP, so are the products and what they show of nodes: each direction is drawn twice.

    A server may write on meanwhile: the entries present at the start are verified.

    Args:
        ledger: of a run.
        mask: of the run.
        progress: is told how many entries are done, of how many.
        looks: by version, who wants to see theta there.

    Raises:
        RunMismatch: names the first entry that does not hold, or after which theta is not finite, and what is wrong
            with it; or a judgement of no entry.
    """
    run = run_of(ledger)
    g_p = mask.g_p
    settings, codec = settings_of(run, ledger.rules, measured=bool(g_p.any())), codec_of(ledger.rules)
    check_mask(mask, run)
    if run.max_step is not None:
        _same("max_step", run.max_step, max_step_of(ledger.rules, mask), "its rules and mask give")
    replica = Replica(mask, run_id=run.run_id, stream=run.stream, digest_every=run.digest_every)
    early, kept = EarlyStopping(settings), False
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
                products = ledger.products(version, settings)
                if products is not None or kept or settings.calibrates(version):  # else older than schema 2
                    kept = True
                    _check_products(products, version, g_p, run.stream, settings)
                judgements = ledger.judgements(version)
                _check_judgements(judgements, version, records, products or (), settings)
                early.remember(judgements)
                _check_terms(entry.terms, terms_of(records, settings, version))
                added = _displacement(ledger, entry, shares_of(records, settings, version), codec, mask.size)
                _same("digest", entry.digest.hex(), replica.apply(entry.terms, added).hex(), "its terms give")
            head, updates = entry.hash(run.run_id), updates + len(records)
    if (judged := ledger.judged_while_open()) is not None:
        raise RunMismatch(f"round {judged!r:.50}", "has judgements, but did not close", ALTERED)
    if (astray := ledger.astray()) is not None:
        raise RunMismatch(f"version {astray!r:.50}", "an update from its theta is in no entry where it can be", ALTERED)
    return Verified(rounds, updates, digest(replica.theta))


def run_of(ledger: Ledger) -> RunDescriptor:
    """The run that a ledger is of.

    Raises:
        LedgerError: it was made, but no run was begun; or it was, and was lost.
    """
    run = ledger.run
    if run is None:
        check_remains(ledger.path, None, 0)
        remedy = "start its server, unless this is a copy without its -wal file: then copy both"
        raise LedgerError(str(ledger.path), "holds no run yet", remedy)
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


def _entry_at(ledger: Ledger, version: int, head: bytes, term: int) -> tuple[Entry, int]:
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


def _check_values(ledger: Ledger, records: Sequence[UpdateRecord], settings: RoundSettings, weights: int) -> None:
    for record in records:
        if record.values is None:
            continue
        if not settings.values_accepted:
            raise RunMismatch("updates", f"its update of {record.node} is a displacement; this run takes none")
        found = ledger.values(record.values.blob, weights)
        _check_size(ledger.blob(record.values.blob), record.values.size)
        _check_verdict(record, verdict_on(found, record.loss, settings.reach(record.values.steps)))


def _check_size(blob: bytes | None, size: int) -> None:
    _same("displacement", f"of {len(blob or b'')} bytes", f"of {size} bytes", "it is said to be")


def _displacement(
    ledger: Ledger, entry: Entry, shares: Sequence[Share], codec: Codec, weights: int
) -> Float32Array | None:
    """What the entry's displacement decodes to, which is what its updates give."""
    added = entry.displacement
    if added is None or not shares:
        _same("displacement", "none" if added is None else "one", "one" if shares else "none", "its updates give")
        return None
    _check_size(ledger.displacement(added.blob), added.size)
    found = ledger.values(added.blob, weights)
    if found.tobytes() != quantised(mean_of(shares, ledger, weights), codec).tobytes():
        raise RunMismatch("displacement", "its displacement is not the mean of its updates'")
    return found


def _check_products(
    found: Products | None, version: int, g_p: Float32Array, stream: str, settings: RoundSettings
) -> None:
    expected: Products = ()
    if settings.measured:
        lanes, steps = settings.lanes, settings.directions_of(version)
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


def _judgement_words(judgement: Judgement | None) -> str:
    if judgement is None:
        return "none"
    verdict = "early-stopped" if judgement.early_stopped else "not early-stopped"
    return f"{judgement.node} {verdict}, rho_later {judgement.rho_later!r}, rho_quiet {judgement.rho_quiet!r}"


def _check_terms(found: Sequence[Term], expected: Sequence[Term]) -> None:
    for index, (term, recomputed) in enumerate(zip_longest(found, expected)):
        _same(f"term {index}", _words(term), _words(recomputed), "its updates give")


def _words(term: Term | None) -> str:
    if term is None:
        return "none"
    age = f"age {term.age}, " if term.age else ""
    return f"{age}lane {term.lane}, step {term.step}, coefficient {term.coefficient:.9g}"


# --- a state folder -------------------------------------------------------------------------------------------------


def verify_folder(
    folder: Path,
    *,
    mask: Path | None = None,
    model: Path | None = None,
    base: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Verified:
    """Verify a server's state_dir: ledger, snapshots and difference.mkd; and an exported model, against its base.

    Snapshots that are not there are passed over.

    Args:
        folder: the state_dir.
        mask: the run's mask file; default: the copy in the folder. The toy engine needs none.
        model: folder of an exported model: of difference.mkd's version, or of the last where there is no such file.
        base: what it was exported from: local folder or hub id.
        progress: is told how many entries are done, of how many.

    Raises:
        LedgerError: there is no ledger, or it cannot be read.
        MaskError: there is no mask file, or it cannot be read.
        RunMismatch: something is not what the ledger says; names the first entry or file.
        ModelMismatch: the exported model is not base and theta, or does not load as such; names what differs.
        MissingExtra: there is a model, and PyTorch is not installed; or its mask is an adapter's, and peft is not.
    """
    with closing(Ledger.read(folder / LEDGER_FILE)) as ledger:
        run = run_of(ledger)
        found = mask_of(folder, run, mask)
        looks, snapshots, files = defaultdict[int, list[Look]](list), list[str](), list[str]()
        for kept in ledger.snapshots():
            looks[kept.version].append(_snapshot_look(snapshot_file(folder, kept.version), kept, run, snapshots))
        exported = ledger.version
        if (folder / DIFFERENCE_FILE).exists():
            exported, look = _difference_look(ledger, folder / DIFFERENCE_FILE, run)
            looks[exported].append(look)
            files.append(DIFFERENCE_FILE)
        if model is not None and base is not None:
            looks[exported].append(_model_look(model, base, found, run.task))
            files.append(str(model))
        return replace(verify_ledger(ledger, found, progress, looks), files=(*snapshots, *files))


def mask_of(folder: Path, run: RunDescriptor, named: Path | None = None) -> Mask:
    """The mask of the run in a state_dir: the file named, or the copy in the folder.

    Raises:
        MaskError: there is no such file, or it cannot be read.
    """
    if named is None and run.engine == "toy":
        return toy_mask(run.weights)
    file = named or mask_file(folder, run.mask_hash)
    if not file.exists():
        raise MaskError(str(file), "is missing", "name the run's mask file with --mask")
    return Mask.load(file)


def check_mask(mask: Mask, run: RunDescriptor) -> None:
    """Refuse the mask of another run.

    Raises:
        RunMismatch: names both hashes.
    """
    if mask.hash != run.mask_hash:
        raise RunMismatch("mask", f"has hash {mask.hash.hex()}, the run's is {run.mask}", "give the run's mask file")


def _snapshot_look(file: Path, kept: KeptSnapshot, run: RunDescriptor, files: list[str]) -> Look:
    """Adds its name to `files`; one that is lost, or that a running server has replaced meanwhile, is passed over."""

    def look(theta: Float32Array, head: bytes) -> None:
        try:
            found = decode_snapshot(file.read_bytes(), kept.hash, run.weights)
        except FileNotFoundError:
            return
        except OSError as error:
            raise RunMismatch(str(file), f"cannot be read ({error.strerror})", ALTERED) from error
        except WireError as error:
            raise RunMismatch(str(file), f"{error.where} {error.problem}", ALTERED) from error
        if (found.run_id, found.version, found.head) != (run.run_id, kept.version, head):
            raise RunMismatch(str(file), f"is not of this run's version {kept.version}", ALTERED)
        _compare(file, digest(found.theta), kept.version, theta)
        files.append(file.name)

    return look


def _difference_look(ledger: Ledger, file: Path, run: RunDescriptor) -> tuple[int, Look]:
    """Its version, and the look at it; keeps of it no more than its digest."""
    try:
        found = Difference.load(file)
    except ModelError as error:
        raise RunMismatch(error.where, error.problem, ALTERED) from error
    if found.run_id != run.run_id:
        raise RunMismatch(str(file), f"is of run {found.run_id.hex()[:8]}, the ledger of run {run.run[:8]}", ALTERED)
    if found.version > ledger.version:
        problem = f"is of version {found.version}, but the ledger ends at version {ledger.version}"
        remedy = "if the ledger was put back to a backup, move this file elsewhere: the server leaves it anew"
        raise RunMismatch(str(file), problem, remedy)
    version, its_digest = found.version, digest(found.theta)
    return version, lambda theta, head: _compare(file, its_digest, version, theta)


def _compare(file: Path, found: bytes, version: int, theta: Float32Array) -> None:
    expected = digest(theta)
    if found != expected:
        problem = f"holds a theta of digest {found.hex()}; the ledger's of version {version} has {expected.hex()}"
        raise RunMismatch(str(file), problem, ALTERED)


def _model_look(model: Path, base: str, mask: Mask, task: Task | None) -> Look:
    """The bytes of the model first, then what loads."""
    with importing("model", "meerkat verify --model"):
        from meerkat_mq.engines.torch.adapter import adapter_pairs  # noqa: PLC0415
        from meerkat_mq.engines.torch.export import check_export  # noqa: PLC0415
        from meerkat_mq.engines.torch.proof import check_loaded  # noqa: PLC0415

    if adapter_pairs(mask):
        need("lora", "a LoRA adapter")

    def look(theta: Float32Array, head: bytes) -> None:
        check_export(model, base, mask, theta)
        if task is not None:
            check_loaded(model, base, mask, theta, task)

    return look
