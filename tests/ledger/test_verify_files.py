"""Verification of what lies beside the ledger: snapshots, the difference file, an exported model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meerkat_mq.errors import ModelMismatch, ModelNotFound, RunMismatch
from meerkat_mq.ledger.files import mask_file
from meerkat_mq.ledger.folder import verify_folder
from meerkat_mq.wire.snapshot import Difference
from tests.ledger.ledgers import RUN, Writer, alter, flip, write
from tests.ledger.test_verify import fails

# --- files beside the ledger ---


def whole(folder: Path) -> Writer:
    """A run with two snapshots, the last at its end, and the difference."""
    writer = Writer(folder)
    for version in range(1, writer.count + 1):
        writer.round()
        if version in (2, writer.count):
            writer.snapshot()
    writer.difference()
    writer.ledger.close()
    return writer


def test_files_that_hold(tmp_path: Path) -> None:
    whole(tmp_path)
    assert set(verify_folder(tmp_path).files) == {"snapshot-2.mks", "snapshot-6.mks", "difference.mkd"}


@pytest.mark.parametrize("at", [0, 30, 60, -1])
@pytest.mark.parametrize("name", ["snapshot-2.mks", "snapshot-6.mks", "difference.mkd"])
def test_a_byte_of_a_file(tmp_path: Path, name: str, at: int) -> None:
    whole(tmp_path)
    flip(tmp_path / name, at)
    fails(tmp_path, str(tmp_path / name))


def test_a_snapshot_that_is_missing(tmp_path: Path) -> None:
    whole(tmp_path)
    (tmp_path / "snapshot-2.mks").unlink()
    assert verify_folder(tmp_path).files == ("snapshot-6.mks", "difference.mkd")


def test_a_snapshot_that_cannot_be_read(tmp_path: Path) -> None:
    whole(tmp_path)
    (tmp_path / "snapshot-2.mks").unlink()
    (tmp_path / "snapshot-2.mks").mkdir()
    fails(tmp_path, str(tmp_path / "snapshot-2.mks"), "cannot be read (Is a directory)")


@pytest.mark.parametrize("change", ["version", "head", "theta"])
def test_a_well_made_snapshot_of_something_else(tmp_path: Path, change: str) -> None:
    writer = Writer(tmp_path)
    writer.round()
    writer.snapshot()
    if change == "version":
        writer.replica.version = 2
        writer.snapshot().rename(tmp_path / "snapshot-1.mks")
        alter(tmp_path, "DELETE FROM snapshots WHERE version = 1")
        alter(tmp_path, "UPDATE snapshots SET version = 1")
    elif change == "head":
        writer.entries.append(replace(writer.entries[-1], terms=()))
        writer.snapshot()
    else:
        writer.replica.theta[0] += 1
        writer.snapshot()
    words = "holds a theta of digest" if change == "theta" else "is not of this run's version 1"
    fails(tmp_path, str(tmp_path / "snapshot-1.mks"), words)


def test_a_difference_of_something_else(tmp_path: Path) -> None:
    writer = whole(tmp_path)
    file, theta = tmp_path / "difference.mkd", writer.replica.theta
    Difference(writer.mask, theta, RUN, 5).save(file)
    fails(tmp_path, str(file), "holds a theta of digest", "the ledger's of version 5 has")
    Difference(writer.mask, theta, RUN, 7).save(file)
    fails(tmp_path, str(file), "is of version 7, but the ledger ends at version 6")
    with pytest.raises(RunMismatch, match="if the ledger was put back to a backup, move this file elsewhere"):
        verify_folder(tmp_path)
    Difference(writer.mask, theta, bytes(16), 6).save(file)
    fails(tmp_path, str(file), "is of run 00000000, the ledger of run 00010203")


# --- an exported model ---


@pytest.fixture(scope="module")
def exported(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on the tiny model and, in `tuned`, what was exported from its end."""
    from meerkat_mq.engines.torch.export import export_model
    from meerkat_mq.engines.torch.load import load_model
    from meerkat_mq.engines.torch.masks import make_mask
    from tests.engines import tiny

    folder = tmp_path_factory.mktemp("exported")
    mask = make_mask(load_model(tiny_llama), tiny.TEXTS, "magnitude", density=0.1, sequences=2, length=32)
    writer = write(folder, mask=mask, engine="transformers")
    writer.difference()
    mask.save(mask_file(folder, mask.hash))
    export_model(tiny_llama, mask, writer.replica.theta, folder / "tuned")
    return folder


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """A copy of the exported model, to be altered."""
    import shutil

    return Path(shutil.copytree(exported / "tuned", tmp_path / "tuned"))


def weight_at(folder: Path, name: str, index: int) -> tuple[Path, int]:
    """Where a float32 weight of a checkpoint lies."""
    from meerkat_mq.engines.torch.checkpoint import stored_tensors

    tensor = stored_tensors(folder)[name]
    return tensor.file, tensor.start + 4 * index


@pytest.mark.timeout(300)  # the first import of torch takes long on a busy machine
class TestExportedModel:
    def test_it_holds(self, exported: Path, tiny_llama: Path) -> None:
        found = verify_folder(exported, model=exported / "tuned", base=str(tiny_llama))
        assert found.files == ("difference.mkd", str(exported / "tuned"))

    def test_the_base_is_not_the_tuned_model(self, exported: Path, tiny_llama: Path) -> None:
        with pytest.raises(ModelMismatch, match=r"weight \d+ of model\.layers\.0\..* is not theta's; export the model"):
            verify_folder(exported, model=tiny_llama, base=str(tiny_llama))
        with pytest.raises(ModelMismatch, match="is not the checkpoint that the mask was made on"):
            verify_folder(exported, model=exported / "tuned", base=str(exported / "tuned"))
        with pytest.raises(ModelNotFound):
            verify_folder(exported, model=exported / "none", base=str(tiny_llama))

    @pytest.mark.parametrize("trained", [True, False])
    def test_one_weight(self, exported: Path, copy: Path, tiny_llama: Path, trained: bool) -> None:
        mask = Difference.load(exported / "difference.mkd").mask
        matrix = mask.matrices[0]
        others = np.setdiff1d(np.arange(np.prod(matrix.shape)), matrix.indices)
        index = int((matrix.indices if trained else others)[-1])
        file, at = weight_at(copy, matrix.name, index)
        flip(file, at)
        whose = "theta's" if trained else "the base's"
        with pytest.raises(ModelMismatch, match=rf"weight {index} of {matrix.name} is not {whose}"):
            verify_folder(exported, model=copy, base=str(tiny_llama))

    def test_a_weight_that_no_mask_covers(self, exported: Path, copy: Path, tiny_llama: Path) -> None:
        file, at = weight_at(copy, "model.norm.weight", 2)
        flip(file, at + 1)
        with pytest.raises(ModelMismatch, match=r"byte 9 of model\.norm\.weight is not the base's"):
            verify_folder(exported, model=copy, base=str(tiny_llama))
