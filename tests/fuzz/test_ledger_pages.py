"""Ledgers with damaged pages, for all that reads one: an error in words or a sound answer, soon, in bounded memory."""

import random
import resource
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from meerkat_mq.config import ServerConfig
from meerkat_mq.errors import MeerkatError
from meerkat_mq.ledger.folder import verify_folder
from meerkat_mq.ledger.inspect import path_shown, rounds_shown
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.observe.page import write_report
from meerkat_mq.server.commands import run_now
from meerkat_mq.server.reporting import read_report
from meerkat_mq.server.service import _prepare, _recover
from tests.fuzz.mutate import COUNT
from tests.fuzz.mutate_bytes import overwrite
from tests.ledger.ledgers import write

PAGE = 4096
SLOWEST_S = 20.0  # of CPU, for one reader: 3 million steps of SQLite
GROWTH_MIB = 300.0  # at the peak: a value may have 257 MiB

Damage = Callable[[random.Random, bytearray], bytearray]


def _page(rng: random.Random, data: bytearray) -> int:
    return PAGE * rng.randrange(max(1, len(data) // PAGE))


def flip_in_header(rng: random.Random, data: bytearray) -> bytearray:
    """Kind of page, free blocks, number of cells, the page to the right: or, of the first page, of the file."""
    start = _page(rng, data)
    data[start + rng.randrange(100 if start == 0 else 16)] = rng.randrange(256)
    return data


def flip_pointer(rng: random.Random, data: bytearray) -> bytearray:
    """A cell lies elsewhere, perhaps in another cell, or outside."""
    start = _page(rng, data) + 8 + 2 * rng.randrange(20)
    data[start : start + 2] = rng.choice((rng.randrange(PAGE), 0, PAGE - 1, 65535)).to_bytes(2, "big")
    return data


def flip_anywhere(rng: random.Random, data: bytearray) -> bytearray:
    for _ in range(rng.randint(1, 20)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def overwrite_number(rng: random.Random, data: bytearray) -> bytearray:
    return bytearray(overwrite(rng, bytes(data)))


def swap_pages(rng: random.Random, data: bytearray) -> bytearray:
    one, other = _page(rng, data), _page(rng, data)
    data[one : one + PAGE], data[other : other + PAGE] = data[other : other + PAGE], data[one : one + PAGE]
    return data


def repeat_page(rng: random.Random, data: bytearray) -> bytearray:
    """Two places of a tree hold the same page: of its rows, some come twice, others never."""
    one, other = _page(rng, data), _page(rng, data)
    data[one : one + PAGE] = data[other : other + PAGE]
    return data


def name_page(rng: random.Random, data: bytearray) -> bytearray:
    """A number that may be that of a page becomes another page's: trees grow into each other, and into themselves."""
    place = _page(rng, data) + rng.choice((8, 12, 32, 36, rng.randrange(PAGE - 4)))
    data[place : place + 4] = rng.randrange(len(data) // PAGE + 2).to_bytes(4, "big")
    return data


def empty_page(rng: random.Random, data: bytearray) -> bytearray:
    start = _page(rng, data)
    data[start : start + PAGE] = bytes(PAGE)
    return data


def cut(rng: random.Random, data: bytearray) -> bytearray:
    return data[: rng.choice((_page(rng, data), rng.randrange(len(data))))]


DAMAGES: tuple[Damage, ...] = (
    flip_in_header, flip_pointer, flip_anywhere, overwrite_number, swap_pages, repeat_page, name_page, empty_page, cut,
)  # fmt: skip


def pages(original: bytes, number: int) -> bytes:
    """The damaged copy with this number."""
    rng = random.Random(f"pages {number}")
    data = bytearray(original)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if data:
            data = rng.choice(DAMAGES)(rng, data)
    return bytes(data)


# --- all that reads a ledger ---


def status(folder: Path) -> None:
    with closing(Ledger.read(folder / LEDGER_FILE)) as ledger:
        run_now(ledger)


def rounds(folder: Path) -> None:
    with closing(Ledger.read(folder / LEDGER_FILE)) as ledger:
        assert all(list(map(str, rounds_shown(ledger, 0, 99))))
        list(path_shown(ledger, "n1", 0, 99))


def report(folder: Path) -> None:
    write_report(folder / "report.html", read_report(folder))


def start(folder: Path) -> None:
    """As a server does until it connects."""
    config = ServerConfig.model_validate(
        {"federation": "f", "state_dir": folder, "engine": "toy", "toy_weights": 40, "rounds": {"lr": 2.0, "count": 6}}
    )
    with closing(Ledger.open(folder / LEDGER_FILE)) as ledger:
        _recover(ledger, _prepare(config, ledger))


def verify(folder: Path) -> bytes:
    return verify_folder(folder).digest


READERS: dict[str, Callable[[Path], object]] = {
    "status": status, "ledger": rounds, "verify": verify, "report": report, "server": start,
}  # fmt: skip


@pytest.fixture
def original(tmp_path: Path) -> Iterator[Path]:
    """A run of several kinds of nodes, in one file."""
    folder = tmp_path / "original"
    absent, ages = [(1, 1), (2, 0)], {(2, 1): 1, (4, 0): 2}
    write(folder, nodes=3, count=6, max_staleness=2, absent=absent, ages=ages, values={2: "int8"})
    with closing(sqlite3.connect(folder / LEDGER_FILE)) as connection:
        assert connection.execute("PRAGMA journal_mode = DELETE").fetchone() == ("delete",)
        assert connection.execute("PRAGMA page_size").fetchone() == (PAGE,)
    with capture_logs():
        yield folder


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.timeout(max(120, COUNT))
@pytest.mark.parametrize("reader", READERS)
def test_damaged_pages(original: Path, tmp_path: Path, reader: str) -> None:
    look, ledger, said = READERS[reader], (original / LEDGER_FILE).read_bytes(), Counter[str]()
    sound, before = verify(original), peak_mib()
    for number in range(COUNT):
        folder = tmp_path / "damaged"
        shutil.copytree(original, folder)
        (folder / LEDGER_FILE).write_bytes(pages(ledger, number))
        refusal, found, began = None, None, time.thread_time()
        try:
            found = look(folder)
        except MeerkatError as error:
            refusal = error
        except Exception as error:
            raise AssertionError(f"{reader}, mutant {number}") from error
        said["read" if refusal is None else type(refusal).__name__] += 1
        words = "" if refusal is None else str(refusal)
        assert (words or "none").isprintable(), f"mutant {number}: {words!r}"
        assert len(words) < 1000, f"mutant {number}: {words}"
        assert refusal or reader != "verify" or found == sound, f"mutant {number} verifies, with another theta"
        assert time.thread_time() - began < SLOWEST_S, f"{reader}, mutant {number}"
        shutil.rmtree(folder)
    assert peak_mib() - before < GROWTH_MIB
    assert len(said) > 1
