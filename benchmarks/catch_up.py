"""What it takes a node to come back to the head of a ledger of 10,000 rounds of a 1 M-weight mask, and where a
snapshot becomes cheaper than the entries missed.

    python -m benchmarks.catch_up [--rounds 10000] [--weights 1000000] [--folder /tmp/ledgers]

Real server, node and Mosquitto processes. The ledger is made by a loop: T = 1, 10 nodes, a digest every round, a
snapshot every 500 and none at the head, so that what is measured is the worst case. A node that was absent for k rounds
caught up with a ledger k entries shorter, was stopped (SIGSTOP) while the server was started anew on the whole ledger,
and then woken. Bytes are PUBLISH packets to the node (replies and rounds); the mask, which it has, is not among them.
Seconds are from waking (a new node: from its first want) until it says that it stands at the head; CPU is the node
process's in that time.
"""

import argparse
import asyncio
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from meerkat_mq.config import BrokerConfig, RoundsConfig, ServerConfig
from meerkat_mq.core.path import Coefficient, Entry, digest, short_hash
from meerkat_mq.core.replica import Replica
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.ledger.run import Run
from meerkat_mq.ledger.snapshots import DIGEST_NS, LINK_BYTES_A_SECOND, LOAD_NS, REPLAY_NS, Snapshots
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.mqtt import Message
from meerkat_mq.observe.logs import configure_logs
from meerkat_mq.rounds.policy import terms_of
from meerkat_mq.rounds.records import UpdateRecord
from meerkat_mq.server.run import prepare_run
from meerkat_mq.wire.frames import decode
from meerkat_mq.wire.limits import packet_bytes
from meerkat_mq.wire.messages import Entries, Offer
from meerkat_mq.wire.snapshot import decode_snapshot, encode_snapshot
from tests.server.federation import NAME, TOPICS, Federation, Service
from tests.support.mosquitto import Mosquitto
from tests.support.peer import Peer
from tests.support.waiting import until

NODE, NODES, PATIENCE_S = "node-0", 10, 600.0
SETTINGS = {"batch_size": 4, "lr": 0.05, "min_nodes": 2, "min_updates": 2, "directions": 1, "snapshot_every": 500}


@dataclass(frozen=True)
class Result:
    way: str
    seconds: float
    cpu_seconds: float
    size: int
    same: bool


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


# --- the ledger -----------------------------------------------------------------------------------------------------


def records(version: int, noise: random.Random) -> tuple[UpdateRecord, ...]:
    scalars = [float(np.float32(noise.gauss(0, 0.05))) for _ in range(NODES)]
    return tuple(UpdateRecord(version, f"node-{slot}", slot, 1, 1, (g,), 0.5) for slot, g in enumerate(scalars))


class Maker:
    """Makes a ledger as a server would, without nodes."""

    def __init__(self, folder: Path, run: Run) -> None:
        self._folder = folder
        self._run = run
        self._noise = random.Random(0)
        described = run.descriptor
        self._replica = Replica(run.mask, run_id=described.run_id, stream=described.stream, digest_every=1)
        self._head = run.mask.hash

    def extend(self, until_version: int, *, last: int) -> None:
        """Close rounds up to a version; a snapshot at each due one before `last`."""
        ledger = Ledger.open(self._folder / LEDGER_FILE)
        if ledger.run is None:
            ledger.begin(self._run.descriptor, self._run.rules)
        ledger.take_term(0, "0" * 16, "benchmark")
        if not ledger.slots():
            for slot in range(NODES):
                ledger.commit_slot(f"node-{slot}", slot, 0)
        snapshots = Snapshots(ledger, self._run.descriptor)
        while (version := self._replica.version) < until_version:
            self._close_rounds(ledger, min(version // 100 * 100 + 100, until_version))
            if self._replica.version % SETTINGS["snapshot_every"] == 0 and self._replica.version < last:
                snapshots.keep(self._replica.version, self._head, self._replica.theta)
        ledger.close()

    def _close_rounds(self, ledger: Ledger, stop: int) -> None:
        first = self._replica.version
        heard = [records(version, self._noise) for version in range(first, stop)]
        terms = [terms_of(updates, self._run.settings, first + at) for at, updates in enumerate(heard)]
        digests = self._replica.replay((made, None) for made in terms)
        with ledger.group():
            for version, updates, made, after in zip(range(first, stop), heard, terms, digests, strict=True):
                entry = Entry(version, made, self._head, after)
                self._head = entry.hash(self._run.descriptor.run_id)
                ledger.commit_updates(updates)
                ledger.commit_entry(entry, updates, NODES, overdue=False)


def make_ledgers(folder: Path, rounds: int, weights: int, marks: Iterable[int]) -> None:
    """`folder/<mark>`: the ledger when it stood at that version."""
    made = folder / "being-made"
    made.mkdir(parents=True)
    config = ServerConfig(
        federation=NAME,
        state_dir=made,
        engine="toy",
        toy_weights=weights,
        rounds=RoundsConfig.model_validate({**SETTINGS, "count": rounds}),
    )
    maker, began = Maker(made, prepare_run(config)), time.monotonic()
    for mark in sorted(marks):
        maker.extend(mark, last=rounds)
        shutil.copytree(made, folder / str(mark))
        note(f"ledger of {mark} rounds, {(made / LEDGER_FILE).stat().st_size:,} bytes")
    note(f"made within {time.monotonic() - began:.0f} s")


# --- catching up ----------------------------------------------------------------------------------------------------


class Ear:
    """Hears what the node is told."""

    def __init__(self, broker: BrokerConfig) -> None:
        self.replies: list[object] = []
        self.size = 0
        broker = broker.model_copy(update={"max_packet_bytes": 2**20})
        self.peer = Peer(broker, "ear", [(TOPICS.reply(NODE), 1), (TOPICS.round, 1)], react=self._hear)

    def _hear(self, message: Message) -> None:
        self.size += packet_bytes(message.topic, message.payload, 1)
        if message.topic == TOPICS.reply(NODE):
            self.replies.append(decode(message.payload))

    @property
    def way(self) -> str:
        """How the node was helped."""
        offers = [reply for reply in self.replies if isinstance(reply, Offer)]
        entries = sum(len(reply.entries) for reply in self.replies if isinstance(reply, Entries))
        if not offers and not entries:
            return "the round frame"
        return f"snapshot + {entries:,} entries" if offers else f"{entries:,} entries"


class Bench:
    def __init__(self, folder: Path, ledgers: Path, broker: BrokerConfig, rounds: int, weights: int) -> None:
        self._folder = folder
        self._ledgers = ledgers
        self._broker = broker
        self._rounds = rounds
        self._weights = weights

    def _serve(self, federation: Federation, mark: int) -> Service:
        shutil.rmtree(self._folder / "server", ignore_errors=True)
        shutil.copytree(self._ledgers / str(mark), self._folder / "server")
        rounds: dict[str, Any] = {**SETTINGS, "count": self._rounds}
        return federation.server(rounds=rounds, toy_weights=self._weights)

    async def _head(self, federation: Federation) -> None:
        state = await federation.eye.state("finished")
        assert state.round == self._rounds

    async def _said(self, federation: Federation, version: int) -> str:
        """Wait until the node says that it stands at a version; the digest that it gives."""
        told = federation.eye.statuses.setdefault(NODE, [])
        await until(lambda: told and told[-1].version == version, within_s=PATIENCE_S)
        return told[-1].digest or ""

    async def _result(self, federation: Federation, ear: Ear, node: Service, began: float, cpu: float) -> Result:
        told = await self._said(federation, self._rounds)
        seconds, cpu = time.monotonic() - began, _cpu_seconds(node.pid) - cpu
        entry = await federation.eye.digest(self._rounds)
        return Result(ear.way, seconds, cpu, ear.size, told == entry.hex())

    async def absent(self, rounds_missed: int) -> Result:
        """A node that stood still while others closed so many rounds."""
        async with Federation(self._folder, self._broker) as federation:
            before = self._rounds - rounds_missed
            server = self._serve(federation, before)
            await federation.eye.state("online")
            node = federation.node(NODE)
            await federation.eye.status(NODE, "online")
            await _rests(node.pid)
            node.signal(signal.SIGSTOP)
            server.stop()
            await server.ended()
            self._serve(federation, self._rounds)
            await self._head(federation)
            ear = Ear(self._broker)
            await ear.peer.connected()
            seen = len(federation.eye.statuses[NODE])
            began, cpu = time.monotonic(), _cpu_seconds(node.pid)
            node.signal(signal.SIGCONT)
            result = await self._result(federation, ear, node, began, cpu)
            assert federation.eye.statuses[NODE][seen].version == before, "the node had not caught up before it slept"
            await ear.peer.leave()
            return result

    async def new(self, *, snapshots: bool) -> Result:
        """A node that has nothing but the mask."""
        async with Federation(self._folder, self._broker) as federation:
            self._serve(federation, self._rounds)
            await self._head(federation)
            if not snapshots:
                for file in (self._folder / "server").glob("snapshot-*"):
                    file.unlink()
            ear = Ear(self._broker)
            await ear.peer.connected()
            wants = federation.eye.wants.setdefault(NODE, [])
            node = federation.node(NODE)
            await until(lambda: any(want.entries_from is not None for want in wants), within_s=PATIENCE_S)
            result = await self._result(federation, ear, node, time.monotonic(), _cpu_seconds(node.pid))
            await ear.peer.leave()
            return result


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


async def _rests(pid: int) -> None:
    """Wait until a process has done nothing for a second."""
    quiet, before = 0, -1.0
    while quiet < 10:
        await asyncio.sleep(0.1)
        quiet = quiet + 1 if _cpu_seconds(pid) == before else 0
        before = _cpu_seconds(pid)


async def measure(ledgers: Path, rounds: int, weights: int, absences: list[int]) -> list[tuple[str, Result]]:
    found: list[tuple[str, Result]] = []
    cases = [*((f"{k:,}", k) for k in absences), (f"{rounds:,}", 0), (f"{rounds:,}, no snapshot at hand", -1)]
    for name, k in cases:
        with tempfile.TemporaryDirectory() as text:
            broker = Mosquitto(Path(text)).start()
            try:
                bench = Bench(Path(text), ledgers, broker.config, rounds, weights)
                found.append((name, await (bench.absent(k) if k > 0 else bench.new(snapshots=k == 0))))
            finally:
                broker.kill()
        note(f"{name}: {found[-1][1]}")
    return found


def constants(weights: int) -> dict[str, tuple[float, float]]:
    """(measured, as `ledger.snapshots` has it): CPU nanoseconds a weight."""
    mask, terms = toy_mask(weights), [((Coefficient(0, 0, 0.01),), None)] * 20
    plain, digesting = (Replica(mask, run_id=bytes(16), stream="mk1", digest_every=every) for every in (10**9, 1))
    replay = _ns(lambda: plain.replay(terms)) / len(terms) / weights
    both = _ns(lambda: digesting.replay(terms)) / len(terms) / weights
    blob = encode_snapshot(bytes(16), 1, bytes(16), plain.theta)
    name = short_hash(blob)
    load = _ns(lambda: digest(decode_snapshot(blob, name, weights).theta)) / weights
    return {
        "replay, a term": (replay, REPLAY_NS),
        "digest": (both - replay, DIGEST_NS),
        "load a snapshot": (load, LOAD_NS),
    }


def _ns(work: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        began = time.thread_time_ns()
        work()
        times.append(time.thread_time_ns() - began)
    return statistics.median(times)


def crossover(link: float, weights: int, snapshot_bytes: int) -> int:
    """How many T = 1 rounds cost as much as a snapshot, by the constants of `ledger.snapshots`."""
    a_round = 46 / link + (REPLAY_NS + DIGEST_NS) * weights * 1e-9
    return round((snapshot_bytes / link + LOAD_NS * weights * 1e-9) / a_round)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--weights", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where ledgers are kept, and found the next time")
    args = parser.parse_args()
    configure_logs(as_json=False, level="WARNING")
    absences = [1, 100]
    with tempfile.TemporaryDirectory() as text:
        ledgers = args.folder or Path(text) / "ledgers"
        if not (ledgers / str(args.rounds)).is_dir():
            make_ledgers(ledgers, args.rounds, args.weights, [args.rounds, *(args.rounds - k for k in absences)])
        snapshot_bytes = max(file.stat().st_size for file in (ledgers / str(args.rounds)).glob("snapshot-*"))
        found = asyncio.run(measure(ledgers, args.rounds, args.weights, absences))
    print("\n| rounds absent | way | bytes to the node | seconds | CPU seconds | digest equal |")
    print("|---|---|---|---|---|---|")
    for name, result in found:
        same = "yes" if result.same else "NO"
        cost = f"{result.size:,} | {result.seconds:.2f} | {result.cpu_seconds:.2f}"
        print(f"| {name} | {result.way} | {cost} | {same} |")
    print("\n| CPU ns a weight | measured | in ledger/snapshots.py |\n|---|---|---|")
    for name, (measured, used) in constants(args.weights).items():
        print(f"| {name} | {measured:.1f} | {used:g} |")
    print("\n| link | a snapshot is cheaper from so many T = 1 rounds on |\n|---|---|")
    for link in (1e5, LINK_BYTES_A_SECOND, 1e7, 1e8):
        print(f"| {link / 1e6:g} MB/s | {crossover(link, args.weights, snapshot_bytes):,} |")
    print(f"\nThe snapshot has {snapshot_bytes:,} bytes; n = {args.weights:,}.")


if __name__ == "__main__":
    main()
