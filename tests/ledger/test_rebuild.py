"""Virtual paths rebuilt from the ledger: they are the paths that nodes walked."""

from pathlib import Path

import numpy as np
import pytest

from meerkat_mq.core.path import seeds_of, virtual_path
from meerkat_mq.core.replica import Replica
from meerkat_mq.core.step import local_steps
from meerkat_mq.engines.toy import QuadraticEngine, toy_mask
from meerkat_mq.errors import BadValue, LedgerError, RunMismatch
from meerkat_mq.ledger.inspect import rebuilt_path, steps_shown, theta_of
from meerkat_mq.rounds.records import Verdict
from tests.ledger.ledgers import RUN, Writer, alter

SIZE = 40


def rounds(folder: Path, count: int, **what: object) -> Writer:
    writer = Writer(folder, **what)  # type: ignore[arg-type]
    for _ in range(count):
        writer.round()
    return writer


@pytest.mark.parametrize("perturbations", [1, 3])
def test_a_path_is_the_one_that_the_node_walked(perturbations: int) -> None:
    class Follower(QuadraticEngine):
        """Keeps the middle of each pair of points that a projected gradient is measured at."""

        def __init__(self) -> None:
            super().__init__(SIZE)
            self.points: list[np.ndarray] = []

        def write(self, theta: np.ndarray) -> None:
            self.points.append(theta.copy())
            super().write(theta)

    engine, theta = Follower(), np.linspace(-1, 1, SIZE, dtype=np.float32)
    seeds = seeds_of(RUN, 3, 1, 4 * perturbations)
    batches = [[{"seed": step}] for step in range(4)]
    scalars, _ = local_steps(engine, theta, seeds, batches, stream="mk1", eps=2.0**-10, lr=0.5)
    walk = virtual_path(theta, scalars, seeds, perturbations=perturbations, stream="mk1", lr=0.5)
    starts = [theta, *(walker.copy() for walker in walk)]
    assert len(starts) == 5
    for step, start in enumerate(starts[:-1]):
        plus, minus = engine.points[2 * perturbations * step : 2 * perturbations * step + 2]
        np.testing.assert_allclose((plus + minus) / 2, start, atol=1e-6)


def test_the_only_nodes_path_ends_at_the_next_theta(tmp_path: Path) -> None:
    writer = rounds(tmp_path, 3, nodes=1, steps=4)
    before = theta_of(writer.ledger, writer.mask, 2, lambda done, total: None)
    path = list(rebuilt_path(writer.ledger, writer.mask, 2, "n0"))
    away = np.linalg.norm(writer.replica.theta.astype(np.float64) - before)
    assert path[-1].distance == pytest.approx(float(away), rel=1e-12)
    assert [step.g for step in path] == list(writer.records(2)[0].scalars)
    assert [step.seed for step in path] == [f"{seed:016x}" for seed in seeds_of(RUN, 2, 0, 4)]
    (products,) = writer.products(2)
    assert [step.gradip for step in path] == [step.g * product for step, product in zip(path, products, strict=True)]


def test_theta_of_any_version_is_the_ledgers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meerkat_mq.ledger.inspect.AT_ONCE", 2)
    writer = rounds(tmp_path, 5, lanes=3)
    replica, told = Replica(writer.mask, run_id=RUN, stream="mk1", digest_every=1), list[tuple[int, int]]()
    for version in range(6):
        theta = theta_of(writer.ledger, writer.mask, version, lambda done, total: told.append((done, total)))
        assert (theta == replica.theta).all()
        if version < 5:
            replica.apply(writer.entries[version].terms)
    assert told[-4:] == [(0, 5), (2, 5), (4, 5), (5, 5)]


def test_several_perturbations_share_a_step(tmp_path: Path) -> None:
    writer = rounds(tmp_path, 1, steps=2, perturbations=3)
    path = list(rebuilt_path(writer.ledger, writer.mask, 0, "n1"))
    assert [step.step for step in path] == list(range(6))
    assert len({step.distance for step in path}) == 2
    assert len({step.distance for step in path[:3]}) == 1


def test_a_path_is_rebuilt_without_what_older_servers_did_not_keep(tmp_path: Path) -> None:
    writer = rounds(tmp_path, 1, steps=2)
    alter(tmp_path, "UPDATE entries SET products = NULL")
    assert [step.gradip for step in rebuilt_path(writer.ledger, writer.mask, 0, "n1")] == [None, None]


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        (
            "UPDATE entries SET products = zeroblob(8) WHERE version = 1",
            r"holds products .* \(8 bytes; 1 × 4 directions ",
        ),
        (
            "UPDATE updates SET scalars = zeroblob(20) WHERE version = 1",
            "holds 5 projected gradients of n0 in round 1, of 4 directions; `meerkat verify` says more",
        ),
    ],
)
def test_a_damaged_ledger_is_an_error_in_words(tmp_path: Path, statement: str, words: str) -> None:
    writer = rounds(tmp_path, 2, steps=4)
    alter(tmp_path, statement)
    with pytest.raises(LedgerError, match=words):
        list(rebuilt_path(writer.ledger, writer.mask, 1, "n0"))
    with pytest.raises(LedgerError, match=words):
        list(steps_shown(writer.ledger, "n0", 0, 2))


def test_who_counts_by_entries_is_told_the_base_version(tmp_path: Path) -> None:
    writer = rounds(tmp_path, 4, max_staleness=3, ages={(3, 1): 2}, absent={(1, 1)})
    with pytest.raises(RunMismatch) as caught:
        list(rebuilt_path(writer.ledger, writer.mask, 3, "n1"))
    assert caught.value.problem == "gave nothing from theta of version 3"
    assert caught.value.remedy == "its update from theta of version 1 is in entry 3: --round 1"
    assert len(list(rebuilt_path(writer.ledger, writer.mask, 1, "n1"))) == 1


def test_what_cannot_be_rebuilt(tmp_path: Path) -> None:
    writer = rounds(tmp_path, 3, absent={(1, 1)}, refused={(1, 2): Verdict.NOT_FINITE})

    def fails(version: int, node: str, words: str, mask_size: int = SIZE) -> None:
        with pytest.raises(RunMismatch, match=words):
            list(rebuilt_path(writer.ledger, toy_mask(mask_size), version, node))

    fails(3, "n0", "round 3: did not close; 3 rounds have; name an earlier one")
    fails(1, "n1", "node n1: gave nothing from theta of version 1; `meerkat ledger --node` says from which")
    fails(1, "nobody", "node nobody: gave nothing from theta of version 1")
    fails(1, "n0", "mask: has hash ", mask_size=41)
    with pytest.raises(BadValue, match="projected gradient: nan is not finite"):
        list(rebuilt_path(writer.ledger, writer.mask, 1, "n2"))
    alter(tmp_path, "DELETE FROM entries WHERE version = 0")
    fails(2, "n0", "entry 0: is missing, or one after it")
