"""A ledger in each store."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from meerkat_mq.ledger.store import Store
from tests.ledger.ledgers import close_all
from tests.ledger.stores import InMemory, InSqlite, Kept, begin


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture(params=["sqlite", "memory"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kept]:
    made: Kept = InSqlite(tmp_path) if request.param == "sqlite" else InMemory()
    yield made
    made.close()


@pytest.fixture
def empty(kept: Kept) -> Store:
    return kept.open()


@pytest.fixture
def store(empty: Store) -> Store:
    """Synchronous rounds, three nodes, term 1."""
    begin(empty)
    return empty


@pytest.fixture
def buffered(empty: Store) -> Store:
    """Updates may be two versions old."""
    begin(empty, window=2)
    return empty
