"""Verification of a server's state folder: the ledger, and each file that holds a theta of it."""

from collections import defaultdict
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.path import digest
from meerkat_mq.errors import MaskError, ModelError, RunMismatch
from meerkat_mq.extras import importing, need
from meerkat_mq.ledger.chain import ALTERED
from meerkat_mq.ledger.files import DIFFERENCE_FILE, made_mask, mask_file
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.ledger.store import Store
from meerkat_mq.ledger.verify import Look, Progress, Verified, compare, run_of, snapshot_look, verify_ledger
from meerkat_mq.tasks.load import task_of
from meerkat_mq.tasks.task import Task
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.snapshot import Difference


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
        mask: the run's mask file; default: the copy in the folder. The toy engine needs none.
        model: folder of an export, of any kind: of difference.mkd's version, or else of the last.
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
            looks[kept.version].append(snapshot_look(ledger, kept, run, snapshots))
        exported = ledger.version
        if (folder / DIFFERENCE_FILE).exists():
            exported, look = _difference_look(ledger, folder / DIFFERENCE_FILE, run)
            looks[exported].append(look)
            files.append(DIFFERENCE_FILE)
        if model is not None and base is not None:
            looks[exported].append(_model_look(model, base, found, None if run.task is None else task_of(run.task)))
            files.append(str(model))
        return replace(verify_ledger(ledger, found, progress, looks), files=(*snapshots, *files))


def mask_of(folder: Path, run: RunDescriptor, named: Path | None = None) -> Mask:
    """The mask of the run in a state_dir: the file named, or the copy in the folder.

    Raises:
        MaskError: there is no such file, or it cannot be read.
    """
    if named is None and (made := made_mask(run)) is not None:
        return made
    file = named or mask_file(folder, run.mask_hash)
    if not file.exists():
        raise MaskError(str(file), "is missing", "name the run's mask file with --mask")
    return Mask.load(file)


def _difference_look(ledger: Store, file: Path, run: RunDescriptor) -> tuple[int, Look]:
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
    return version, lambda theta, head: compare(str(file), its_digest, version, theta)


def _model_look(model: Path, base: str, mask: Mask, task: Task | None) -> Look:
    """The bytes of the model first, then what loads; of an export of what training changed, its bytes."""
    with importing("model", "meerkat verify --model"):
        from meerkat_mq.engines.torch.adapter import adapter_pairs  # noqa: PLC0415
        from meerkat_mq.engines.torch.differences import check_difference  # noqa: PLC0415
        from meerkat_mq.engines.torch.export import check_export  # noqa: PLC0415
        from meerkat_mq.engines.torch.proof import check_loaded  # noqa: PLC0415

    if adapter_pairs(mask):
        need("lora", "a LoRA adapter")

    def look(theta: Float32Array, head: bytes) -> None:
        if check_difference(model, base, mask, theta):
            return
        check_export(model, base, mask, theta)
        if task is not None:
            check_loaded(model, base, mask, theta, task)

    return look
