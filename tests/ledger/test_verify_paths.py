"""Verification of virtual paths: products, judgements, early-stopped updates and their lengths."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from meerkat_mq.config import EarlyStoppingConfig
from meerkat_mq.core.directions import direction
from meerkat_mq.core.mask import Mask, MaskedMatrix
from meerkat_mq.core.path import seed_for
from meerkat_mq.errors import RunMismatch
from meerkat_mq.ledger.folder import verify_folder
from meerkat_mq.ledger.sqlite import LEDGER_FILE
from meerkat_mq.rounds.records import Verdict
from tests.ledger.ledgers import RUN, Writer, alter, write

RULES: dict[str, Any] = {"steps": 2, "calibration_steps": 12, "every": 4, "rho_later": 1.2, "rho_quiet": 0.9}
PATHS: dict[str, Any] = {"nodes": 4, "lanes": 2, "steps": 5}


def early(by: Literal["vpcs", "random"] = "vpcs", **changes: Any) -> EarlyStoppingConfig:
    return EarlyStoppingConfig.model_validate({"by": by, **RULES, "require": "either", **changes})


def stopped(writer: Writer, version: int) -> set[str]:
    return {judgement.node for judgement in writer.judgements[version] if judgement.early_stopped}


def fails(folder: Path, version: int, words: str) -> None:
    with pytest.raises(RunMismatch) as caught:
        verify_folder(folder)
    assert caught.value.where == f"entry {version}"
    assert words in caught.value.problem


def unmeasured(size: int) -> Mask:
    zeros = np.zeros(size, dtype=np.float32)
    return Mask((MaskedMatrix("toy", (size,), np.arange(size, dtype=np.uint32), zeros, zeros),), bytes(32), bytes(32))


# --- what holds ---


@pytest.mark.parametrize("config", [early(), early("random"), early(every=0), early(steps=5)], ids=str)
@pytest.mark.parametrize("perturbations", [1, 3])
def test_a_clean_ledger_passes(tmp_path: Path, config: EarlyStoppingConfig, perturbations: int) -> None:
    writer = write(tmp_path, **PATHS, perturbations=perturbations, early_stopping=config)
    assert verify_folder(tmp_path).rounds == 6
    lengths = {len(record.scalars) for record in writer.records(5)}
    if config.steps == 5:  # as many as everybody's
        assert lengths == {5 * perturbations}
        assert writer.judgements == [()] * 6
    else:
        assert lengths == {2 * perturbations, 5 * perturbations}
        assert [version for version in range(6) if writer.judgements[version]] == ([0, 4] if config.every else [0])


def test_what_the_verdict_of_a_calibration_round_changes(tmp_path: Path) -> None:
    writer = write(tmp_path, **PATHS, early_stopping=early())
    assert stopped(writer, 0)
    assert stopped(writer, 4) not in (set(), stopped(writer, 0))
    verify_folder(tmp_path)


def test_the_control_needs_no_gradient(tmp_path: Path) -> None:
    mask = unmeasured(30)
    writer = write(tmp_path, **PATHS, mask=mask, engine="transformers", early_stopping=early("random"))
    mask.save(tmp_path / "m.mkm")
    assert verify_folder(tmp_path, mask=tmp_path / "m.mkm").rounds == 6
    assert len(stopped(writer, 0)) == 1
    alter(tmp_path, "UPDATE entries SET products = zeroblob(40) WHERE version = 2")
    with pytest.raises(RunMismatch, match="entry 2: it has products of 10 directions; the mask gives those of 0"):
        verify_folder(tmp_path, mask=tmp_path / "m.mkm")


# --- products ---


def test_the_product_of_a_direction_is_what_anybody_would_compute(tmp_path: Path) -> None:
    writer = Writer(tmp_path, **PATHS)
    writer.round()
    found = writer.ledger.products(0, writer.settings)
    assert found is not None
    z = direction("mk1", seed_for(RUN, 0, 1, 3), 0, writer.mask.size).astype(np.float64)
    assert found[1][3] == pytest.approx(float(np.dot(z, writer.mask.g_p.astype(np.float64))), rel=1e-6)


@pytest.mark.parametrize("at", [0, 17, 39])
def test_a_bit_of_a_product(tmp_path: Path, at: int) -> None:
    writer = Writer(tmp_path, **PATHS)
    for _ in range(4):
        writer.round()
    writer.ledger.close()
    with closing(sqlite3.connect(tmp_path / LEDGER_FILE)) as connection:
        (blob,) = connection.execute("SELECT products FROM entries WHERE version = 2").fetchone()
    changed = bytearray(blob)
    changed[at] ^= 1
    alter(tmp_path, "UPDATE entries SET products = ? WHERE version = 2", bytes(changed))
    fails(tmp_path, 2, f"its product of lane {at // 20}, step {at % 20 // 4} is ")


@pytest.mark.parametrize(
    ("products", "words"),
    [
        ("NULL", "it has no products; the mask gives those of 10"),
        ("x''", "it has products of 0 directions; the mask gives those of 10"),
        ("zeroblob(32)", "holds products that no server writes (32 bytes; 2 × 5 directions have 40)"),
        ("zeroblob(12)", "holds products that no server writes (12 bytes; 2 × 5 directions have 40)"),
        ("'text'", "products that no server writes ('text')"),
        ("CAST(randomblob(400) || x'ff' AS TEXT)", "is damaged (Could not decode to UTF-8 column 'products')"),
    ],
)
def test_products_that_are_none(tmp_path: Path, products: str, words: str) -> None:
    write(tmp_path, **PATHS)
    alter(tmp_path, f"UPDATE entries SET products = {products} WHERE version = 3")
    fails(tmp_path, 3, words)


def test_a_calibration_round_without_products(tmp_path: Path) -> None:
    """Nobody passes a ledger with judgements off as one of a server that kept none."""
    write(tmp_path, **PATHS, early_stopping=early())
    alter(tmp_path, "UPDATE entries SET products = NULL")
    fails(tmp_path, 0, "it has no products; the mask gives those of 24")


# --- judgements and verdicts ---


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("UPDATE judgements SET rho_later = rho_later + 1e-9", "its judgement is n0 "),
        ("UPDATE judgements SET rho_quiet = 0.25", "its judgement is n0 "),
        ("UPDATE judgements SET early_stopped = NOT early_stopped", "its judgement is n0 "),
        ("UPDATE judgements SET rho_later = 'high'", "a judgement that no server writes (rho_later is 'high')"),
        ("UPDATE judgements SET early_stopped = 'yes'", "a judgement that no server writes (early_stopped is 'yes')"),
        ("UPDATE judgements SET early_stopped = 2", "a judgement that no server writes (early_stopped is 2)"),
        ("UPDATE judgements SET slot = slot + 9", "a judgement that no server writes (no node has slot 9)"),
        ("DELETE FROM judgements", "its judgement is n1 "),
    ],
)
def test_a_judgement(tmp_path: Path, change: str, words: str) -> None:
    write(tmp_path, **PATHS, early_stopping=early())
    alter(tmp_path, f"{change} WHERE version = 4 {'AND slot = 0' if 'slot +' not in change else ''}")
    fails(tmp_path, 4, words)


def test_a_judgement_where_none_is_due(tmp_path: Path) -> None:
    write(tmp_path, **PATHS, early_stopping=early())
    alter(tmp_path, "INSERT INTO judgements VALUES (3, 1, 2.0, 1.0, 1)")
    fails(tmp_path, 3, "its judgement is n1 early-stopped, rho_later 2.0, rho_quiet 1.0; its updates give none")


@pytest.mark.parametrize("version", ["6", "8", "50", "-1", "'x'"])
def test_a_judgement_of_a_round_that_did_not_close(tmp_path: Path, version: str) -> None:
    write(tmp_path, **PATHS, early_stopping=early())
    alter(tmp_path, f"INSERT INTO judgements VALUES ({version}, 0, 1.0, 1.0, 1)")
    with pytest.raises(RunMismatch, match=f"round {version}: has judgements, but did not close"):
        verify_folder(tmp_path)


@pytest.mark.parametrize("by", ["vpcs", "random"])
def test_stale_updates_of_nodes_that_were_judged_since(tmp_path: Path, by: Literal["vpcs", "random"]) -> None:
    late = {(5, 0): 2, (5, 1): 2, (6, 2): 3}
    absent = {(version - age, slot) for (version, slot), age in late.items()}
    writer = write(tmp_path, **PATHS, count=9, early_stopping=early(by), max_staleness=3, ages=late, absent=absent)
    assert stopped(writer, 4) or stopped(writer, 0)
    assert verify_folder(tmp_path).rounds == 9


def test_a_verdict(tmp_path: Path) -> None:
    writer = write(tmp_path, **PATHS, early_stopping=early())
    slot = min(int(node[1:]) for node in stopped(writer, 4))
    alter(tmp_path, "UPDATE updates SET verdict = 0 WHERE version = 4 AND slot = ?", slot)
    fails(tmp_path, 4, f"its update of n{slot} is kept as accepted, but is early stopped")
    other = next(slot for slot in range(4) if f"n{slot}" not in stopped(writer, 4))
    alter(tmp_path, "UPDATE updates SET verdict = ? WHERE version = 4", int(Verdict.EARLY_STOPPED))
    with pytest.raises(
        RunMismatch, match=rf"entry 4: its update of n{other} is kept as early stopped, but is accepted"
    ):
        verify_folder(tmp_path)


def test_a_verdict_in_a_round_that_judges_nobody(tmp_path: Path) -> None:
    write(tmp_path, **PATHS, early_stopping=early())
    alter(tmp_path, "UPDATE updates SET verdict = 5 WHERE version = 2 AND slot = 1")
    fails(tmp_path, 2, "its update of n1 is kept as early stopped, but is accepted")


# --- lengths ---


@pytest.mark.parametrize("by", ["vpcs", "random"])
def test_an_update_of_another_length_than_its_round_asked_for(tmp_path: Path, by: Literal["vpcs", "random"]) -> None:
    writer = write(tmp_path, **PATHS, early_stopping=early(by))
    slot = min(int(node[1:]) for node in stopped(writer, 0))
    alter(tmp_path, "UPDATE updates SET scalars = zeroblob(20) WHERE version = 2 AND slot = ?", slot)
    fails(tmp_path, 2, f"its update of n{slot} has 5 projected gradients, but was asked for 2")


def test_an_update_of_a_calibration_round_that_is_short(tmp_path: Path) -> None:
    write(tmp_path, **PATHS, early_stopping=early())
    alter(tmp_path, "UPDATE updates SET scalars = zeroblob(8) WHERE version = 4 AND slot = 0")
    fails(tmp_path, 4, "its update of n0 has 2 projected gradients, but was asked for 12")
