"""What the ledger costs: its size after 10,000 rounds, and the time of a commit.

    python benchmarks/ledger.py [--folder DIR]

Feeds `Ledger` as the server does: one group for a round's updates, one for its entry. The folder should lie on the
disk that a server would use.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

from meerkat_mq.config import ServerConfig
from meerkat_mq.core.path import Coefficient, Entry
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.rounds.records import UpdateRecord
from meerkat_mq.server.run import prepare_run


def record(version: int, slot: int) -> UpdateRecord:
    return UpdateRecord(version, f"node-{slot}", slot, 2**31 + slot, 1, (1.0 / (1 + version + slot),), 0.7)


def feed(folder: Path, rounds: int, nodes: int, lanes: int) -> tuple[list[float], list[float]]:
    """Seconds of each commit of updates, and of each commit of an entry."""
    updates, entries = [], []
    with closing(Ledger.open(folder / LEDGER_FILE)) as ledger:
        run = prepare_run(ServerConfig(federation="f", state_dir=folder, engine="toy"))
        ledger.begin(run.descriptor, run.rules)
        ledger.take_term(0, "0" * 16, "here")
        with ledger.group():
            for slot in range(nodes):
                ledger.commit_slot(f"node-{slot}", slot, 0)
        for version in range(rounds):
            records = [record(version, slot) for slot in range(nodes)]
            terms = tuple(Coefficient(lane, 0, 1.0 / (version + 1)) for lane in range(lanes))
            began = time.perf_counter()
            with ledger.group():
                ledger.commit_updates(records)
            heard = time.perf_counter()
            with ledger.group():
                ledger.commit_entry(Entry(version, terms, bytes(16), bytes(16)), records, nodes, False)
            updates.append(heard - began)
            entries.append(time.perf_counter() - heard)
    return updates, entries


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    where = parser.parse_args().folder
    for rounds, nodes, lanes in ((10_000, 10, 3), (100, 1000, 333)):
        with tempfile.TemporaryDirectory(dir=where) as folder:
            updates, entries = feed(Path(folder), rounds, nodes, lanes)
            size = sum(file.stat().st_size for file in Path(folder).iterdir())
        group, entry = (1e6 * statistics.median(times) for times in (updates, entries))
        print(
            f"{rounds} rounds, {nodes} nodes, {lanes} lanes: {size / 1e6:.2f} MB; commit of a group of updates "
            f"{group:.0f} µs ({group / nodes:.1f} µs an update), of an entry {entry:.0f} µs"
        )


if __name__ == "__main__":
    main()
