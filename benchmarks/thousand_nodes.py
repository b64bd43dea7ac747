"""A thousand toy nodes on Mosquitto: the length of a T = 1 round, and what an update costs the server.

    python -m benchmarks.thousand_nodes [--nodes 1000] [--rounds 50] [--node-processes 1]
    python -m benchmarks.thousand_nodes --nodes 4 --rounds 20000       the server's memory over a long run

The server is a process of its own; the nodes are the real machine on the real session, all in one process (or in
`--node-processes`), with steps that cost next to nothing. Server CPU is user + system time of the whole process while
the measured rounds run, divided by the updates that closed them.
"""

import argparse
import asyncio
import contextlib
import os
import resource
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from meerkat_mq.broker.embedded import embedded_broker
from meerkat_mq.config import BrokerConfig
from meerkat_mq.core.path import digest, seed_for
from meerkat_mq.core.replica import Replica
from meerkat_mq.core.step import local_steps
from meerkat_mq.engines.toy import QuadraticEngine, toy_mask
from meerkat_mq.mqtt import Message, Session
from meerkat_mq.observe.logs import configure_logs
from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.node import NodeMachine
from meerkat_mq.wire.descriptor import NodeStatus, RunDescriptor, ServerState, decode_control
from meerkat_mq.wire.frames import Entries, Refusal, Round, Update, Welcome, decode, encode
from meerkat_mq.wire.topics import Topics

NAME = "thousand"
WARM_UP = 5
WEIGHTS = 16


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


class Eye:
    """Sees the rounds, and reads the server's CPU clock at each, and its memory at some."""

    def __init__(self, server: int, last: int) -> None:
        self.at: dict[int, tuple[float, float]] = {}
        self.sizes: dict[int, int] = {}
        self.rss: dict[int, int] = {}
        self.seen = asyncio.Event()
        self._server, self._last = server, last

    def __call__(self, message: Message) -> None:
        frame = decode(message.payload)
        assert isinstance(frame, Round)
        version = frame.header.version
        if frame.is_open or version == self._last:
            self.at.setdefault(version, (time.monotonic(), cpu_seconds(self._server)))
            self.sizes.setdefault(version, len(frame.asked))
        if version in (self._last, 1000) or version % 5000 == 0:
            self.rss.setdefault(version, resident_kib(self._server))
        if version == self._last:
            self.seen.set()


class ToyNode:
    """The node's machine on the real session; 16 weights, so that its steps need no worker thread."""

    def __init__(self, name: str, broker: BrokerConfig) -> None:
        self._row = [{"seed": int(name[1:])}]
        self._engine = QuadraticEngine(WEIGHTS)
        self._topics = Topics(NAME)
        self._name = name
        self._boot = secrets.randbits(32)
        self._run: RunDescriptor | None = None
        self._machine: NodeMachine | None = None
        self._replica: Replica
        topics = (self._topics.server, self._topics.run, self._topics.round, self._topics.reply(name))
        self.session = Session(
            broker,
            name,
            subscriptions=[(topic, 1) for topic in topics],
            on_message=self._on_message,
            on_connected=lambda link: self._give(e.Connected(self._now())),
        )

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _on_message(self, message: Message) -> None:
        if message.topic == self._topics.run:
            self._join(decode_control(message.payload, RunDescriptor))
        elif message.topic == self._topics.server:
            self._give(e.ServerCame(self._now(), decode_control(message.payload, ServerState)))
        else:
            frame = decode(message.payload)
            assert isinstance(frame, Round | Welcome | Entries | Refusal)
            self._give(e.FrameCame(self._now(), frame))

    def _join(self, run: RunDescriptor) -> None:
        if self._machine is not None:
            return
        mask = toy_mask(run.weights)
        self._run = run
        self._replica = Replica(mask, run_id=run.run_id, stream=run.stream, digest_every=run.digest_every)
        self._machine = NodeMachine(
            run_id=run.run_id, mask_hash=mask.hash, base=digest(mask.theta_0), boot=self._boot, now=self._now()
        )
        if self.session.link is not None:
            self._give(e.Connected(self._now()))

    def _give(self, event: e.NodeEvent) -> None:
        if self._machine is not None:
            for effect in self._machine.handle(event):
                self._perform(effect)

    def _perform(self, effect: e.NodeEffect) -> None:
        assert self._run is not None
        match effect:
            case e.PublishStatus():
                status = NodeStatus(status="online", boot=self._boot, link=self.session.link or 0, host="here")
                self.session.publish(self._topics.up(self._name, "status"), status.encode(), retain=True)
            case e.Send(frame):
                topic = self._topics.up(self._name, "update" if isinstance(frame, Update) else "want")
                self.session.publish(topic, encode(frame))
            case e.ApplyEntries(entries):
                digests = tuple(self._replica.apply(entry.terms) for entry in entries)
                self._give(e.EntriesApplied(self._now(), entries, digests))
            case e.StartSteps(version, lane, steps, eps):
                seeds = [seed_for(self._run.run_id, version, lane, step) for step in range(steps)]
                scalars, loss = local_steps(
                    self._engine, self._replica.theta, seeds, [self._row] * steps,
                    stream=self._run.stream, eps=eps, lr=self._run.lr,
                )  # fmt: skip
                self._give(e.StepsDone(self._now(), version, scalars, loss))


async def run_nodes(url: str, first: int, count: int) -> None:
    async with asyncio.TaskGroup() as tasks:
        for number in range(first, first + count):
            tasks.create_task(ToyNode(f"n{number}", BrokerConfig(url=url)).session.run())
            if number % 20 == 0:
                await asyncio.sleep(0.05)


def server_table(folder: Path, url: str, nodes: int, rounds: int) -> str:
    return "\n".join([
        f'federation = "{NAME}"', f'state_dir = "{folder}/server"', 'engine = "toy"', f"toy_weights = {WEIGHTS}",
        "[broker]", f'url = "{url}"',
        "[rounds]", f"count = {rounds}", f"min_nodes = {nodes}", "directions = 1", "batch_size = 1", "quorum = 1.0",
        "deadline_s = 600", "lr = 0.001", "",
    ])  # fmt: skip


async def measure(nodes: int, rounds: int, processes: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with embedded_broker() as broker:
            config = folder / "federation.toml"
            config.write_text(server_table(folder, broker.config.url, nodes, rounds))
            command = [sys.executable, "-m", "meerkat_mq.server", "--config", str(config), "--json-logs"]
            with (folder / "server.log").open("wb") as log:
                server = subprocess.Popen([*command, "--log-level", "WARNING"], stdout=log, stderr=log)  # noqa: ASYNC220
            eye = Eye(server.pid, rounds)
            session = Session(broker.config, "eye", subscriptions=[(Topics(NAME).round, 1)], on_message=eye)
            watching = asyncio.create_task(session.run())
            share = -(-nodes // processes)
            fleet = [sys.executable, "-m", "benchmarks.thousand_nodes", "--fleet", broker.config.url]
            fleets = [
                subprocess.Popen([*fleet, str(first), str(min(share, nodes - first))])  # noqa: ASYNC220
                for first in range(0, nodes, share)
            ]
            try:
                while not eye.seen.is_set():
                    if server.poll() is not None:
                        sys.exit((folder / "server.log").read_text())
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(eye.seen.wait(), 1.0)
                report(eye, nodes, rounds)
            finally:
                for process in fleets:
                    process.terminate()
                server.terminate()
                server.wait()
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching


def report(eye: Eye, nodes: int, rounds: int) -> None:
    versions = [version for version in sorted(eye.at) if WARM_UP <= version <= rounds]
    times = [eye.at[b][0] - eye.at[a][0] for a, b in pairwise(versions) if b == a + 1]
    cpu = eye.at[versions[-1]][1] - eye.at[versions[0]][1]
    updates = (versions[-1] - versions[0]) * nodes
    print(f"nodes                {nodes}, rounds measured {len(times)}")
    print(f"round                median {1000 * statistics.median(times):.0f} ms, largest {1000 * max(times):.0f} ms")
    print(f"server CPU           {1e6 * cpu / updates:.0f} µs an update")
    print("server RSS           " + ", ".join(f"{kib / 1024:.1f} MiB at {version}" for version, kib in eye.rss.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--node-processes", type=int, default=1)
    parser.add_argument("--fleet", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is a file
    if arguments.fleet:
        configure_logs(as_json=True, level="ERROR")
        url, first, count = arguments.fleet
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(run_nodes(url, int(first), int(count)))
        return
    configure_logs(as_json=True, level="ERROR")
    asyncio.run(measure(arguments.nodes, arguments.rounds, arguments.node_processes))


if __name__ == "__main__":
    main()
