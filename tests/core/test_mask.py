from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat_mq.core.mask import Mask, MaskedMatrix
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.errors import MaskError
from protocol.vectors_core import golden_mask
from tests.support.memory import peak_of

GOOD: dict[str, Any] = {
    "name": "w",
    "shape": (2, 3),
    "indices": np.array([1, 5], np.uint32),
    "theta_0": np.array([0.5, -1], np.float32),
    "g_p": np.zeros(2, np.float32),
}
ONE = np.ones(1, np.float32)


def matrix(**other: Any) -> MaskedMatrix:
    return MaskedMatrix(**{**GOOD, **other})


@pytest.mark.parametrize(
    "other",
    [
        {"name": ""},
        {"name": "x" * 1025},
        {"shape": ()},
        {"shape": (0, 6)},
        {"shape": (1,) * 8 + (6,)},
        {"shape": (2**32,)},
        {"shape": (5,)},
        {"indices": np.array([5, 1], np.uint32)},
        {"indices": np.array([1, 1], np.uint32)},
        {"indices": np.array([1, 6], np.uint32)},
        {"indices": np.array([-1, 5])},
        {"indices": np.array([1], np.uint32)},
        {"indices": np.array([[1, 5]], np.uint32)},
        {"indices": np.empty(0, np.uint32), "theta_0": np.empty(0, np.float32), "g_p": np.empty(0, np.float32)},
        {"theta_0": np.array([0.5, np.nan], np.float32)},
        {"theta_0": np.array([0.5, 1.0])},
        {"g_p": np.array([0.5, np.inf], np.float32)},
        {"g_p": ONE},
    ],
    ids=str,
)
def test_what_is_no_mask_of_its_matrix_is_refused(other: dict[str, Any]) -> None:
    assert matrix().indices.size == 2
    with pytest.raises(MaskError):
        matrix(**other)


@pytest.mark.parametrize(
    ("names", "fingerprint"), [((), bytes(32)), (("b", "a"), bytes(32)), (("a", "a"), bytes(32)), (("a",), bytes(31))]
)
def test_a_mask_has_one_order_and_whole_fingerprints(names: tuple[str, ...], fingerprint: bytes) -> None:
    with pytest.raises(MaskError):
        Mask(tuple(matrix(name=name) for name in names), fingerprint, bytes(32))
    with pytest.raises(MaskError):
        Mask(tuple(matrix(name=name) for name in names), bytes(32), fingerprint)


def test_order_is_by_bytes_and_slices_cover_theta() -> None:
    mask = golden_mask()
    assert [m.name for m in mask.matrices] == ["Z.weight", "a.weight", "é.weight"]
    assert mask.size == 10
    assert mask.covered == 24 + 70_000 * 60_000 + 30
    theta, g_p = mask.theta_0, mask.g_p
    for part, place in mask.slices():
        assert np.array_equal(theta[place], part.theta_0)
        assert np.array_equal(g_p[place], part.g_p)
    theta[:] = 0
    assert mask.theta_0.any(), "theta_0 must be a copy"


def test_save_and_load_keep_every_bit(tmp_path: Path) -> None:
    mask = golden_mask()
    path = tmp_path / "base.mask"
    toy_mask(3).save(path)
    mask.save(path)
    again = Mask.load(path)
    assert again.to_bytes() == mask.to_bytes()
    assert again.hash == mask.hash
    assert again.fingerprint == mask.fingerprint
    assert [item.name for item in tmp_path.iterdir()] == ["base.mask"]


def test_a_file_with_holes_that_is_larger_than_memory(tmp_path: Path) -> None:
    """It takes no room on a disk, nor in an archive; reading it raised a MemoryError."""
    with (tmp_path / "m.mkm").open("wb") as file:
        file.truncate(2**43)
    with pytest.raises(MaskError, match=r"m\.mkm: cannot be read \(it has 8,796,093,022,208 bytes"):
        Mask.load(tmp_path / "m.mkm")


def test_loading_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(MaskError, match=r"no\.mask.*No such file"):
        Mask.load(tmp_path / "no.mask")
    damaged = tmp_path / "damaged.mask"
    damaged.write_bytes(golden_mask().to_bytes()[:-1])
    with pytest.raises(MaskError, match=r"damaged\.mask"):
        Mask.load(damaged)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_mutated_mask_file_is_refused_or_canonical(data: st.DataObject) -> None:
    good = golden_mask().to_bytes()
    place = data.draw(st.integers(0, len(good)))
    removed, added = data.draw(st.integers(0, 5)), data.draw(st.binary(max_size=5))
    mutated = good[:place] + added + good[place + removed :]
    try:
        mask = Mask.from_bytes(mutated)
    except MaskError:
        return
    assert mask.to_bytes() == mutated


def test_more_matrices_than_the_limit_are_not_even_read() -> None:
    many = golden_mask().to_bytes()[:72] + (65537).to_bytes(4, "little") + 65537 * bytes(7)
    with pytest.raises(MaskError, match="65537 matrices are more"):
        Mask.from_bytes(many)


@pytest.mark.parametrize("offset", [72, 78 + 1, 80])
def test_declared_sizes_allocate_nothing(offset: int) -> None:
    good = golden_mask().to_bytes()
    hostile = good[:offset] + b"\xff\xff\xff\xff" + good[offset + 4 :]
    assert peak_of(lambda: Mask.from_bytes(hostile), MaskError) < 200_000
