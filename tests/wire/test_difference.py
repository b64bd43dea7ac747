"""The difference file: mask and theta come back bit for bit; anything else is refused by name and loses nothing."""

from pathlib import Path

import numpy as np
import pytest

from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.errors import ModelError
from meerkat_mq.wire.snapshot import Difference


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    mask = toy_mask(500)
    theta = np.linspace(-1, 1, mask.size, dtype=np.float32)
    path = tmp_path / "difference.mkd"
    Difference(mask, theta, bytes(range(16)), 7).save(path)
    return path


def test_round_trip(saved: Path) -> None:
    found = Difference.load(saved)
    assert (found.version, found.run_id) == (7, bytes(range(16)))
    assert found.mask.hash == toy_mask(500).hash
    assert found.theta.tobytes() == np.linspace(-1, 1, 500, dtype=np.float32).tobytes()
    assert [file.name for file in saved.parent.iterdir()] == ["difference.mkd"]


@pytest.mark.parametrize("cut", [0, 1, 8, 40, 100, -1])
def test_cut_short(saved: Path, cut: int) -> None:
    saved.write_bytes(saved.read_bytes()[:cut])
    with pytest.raises(ModelError, match=r"difference\.mkd: is damaged"):
        Difference.load(saved)


def test_a_changed_byte_is_noticed_or_means_the_same(tmp_path: Path) -> None:
    saved, mask, refused = tmp_path / "difference.mkd", toy_mask(100), 0
    Difference(mask, np.linspace(-1, 1, 100, dtype=np.float32), bytes(range(16)), 7).save(saved)
    whole, theta = saved.read_bytes(), Difference.load(saved).theta.tobytes()
    for place in set(range(len(whole))) - set(range(8, 28)):  # run id and version: any value is one
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        saved.write_bytes(damaged)
        try:
            found = Difference.load(saved)
        except ModelError:
            refused += 1
        else:  # zstd has bits that mean nothing
            assert (found.theta.tobytes(), found.mask.hash) == (theta, mask.hash)
    assert refused > len(whole) - 40


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.mkd: cannot be read"):
        Difference.load(tmp_path / "none.mkd")
