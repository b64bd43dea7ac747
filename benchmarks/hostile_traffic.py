"""What one hostile node of eight costs the others: rounds, memory, log; and how soon it is flagged.

    python -m benchmarks.hostile_traffic                     each attack for 60 s: 18 minutes
    python -m benchmarks.hostile_traffic --attacks H6 H8 --seconds 20

Real server and node processes with the toy engine, Mosquitto with `broker/mosquitto-tls.conf` and a certificate for
each; the hostile node has one, too. First, the honest nodes are left alone for a while: that pace is the measure of the
same run's pace during the attack. Attacks as in docs/threat-model.md. Prints a Markdown table; exits with 1 where
something does not hold that Cost.holds names.
"""

import argparse
import asyncio
import contextlib
import itertools
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meerkat_mq.core.path import short_hash
from meerkat_mq.rounds.records import Verdict
from meerkat_mq.wire.arrays import split
from meerkat_mq.wire.descriptor import NodeStatus
from meerkat_mq.wire.frames import decode, encode
from meerkat_mq.wire.messages import Header, Round, Update, Values, Want, in_words
from tests.broker.guarded import Guarded, Raw
from tests.server.federation import TOPICS, Federation, Service
from tests.support.peer import Peer, peer
from tests.support.resident import resident_mib
from tests.support.waiting import until

EVIL = "node-7"
WEIGHTS = 100_000
ROUNDS = {"count": 1_000_000, "deadline_s": 10.0, "snapshot_every": 1000}
TICK_S = 0.05


@dataclass
class Scene:
    """A running federation, and one certificate in the wrong hands."""

    guarded: Guarded
    federation: Federation
    server: Service
    nodes: list[Service]

    @contextlib.asynccontextmanager
    async def evil(self, *filters: str, name: str = EVIL) -> AsyncIterator[Peer]:
        """A connection with the hostile node's certificate."""
        way = self.guarded.way(f"nodes/{EVIL}").model_copy(update={"max_packet_bytes": 2**17})
        async with peer(way, name, [(topic, 1) for topic in filters]) as session:
            yield session

    def header(self, above: int = 0, version: int | None = None) -> Header:
        """Of the server's term, or so far above it."""
        run, term = self.federation.eye.runs[-1], self.federation.eye.states[-1].term
        return Header.of(run.run_id, term + above, self.version if version is None else version, run.mask_hash)

    @property
    def version(self) -> int:
        return self.federation.eye.version

    def status(self, word: str = "online", **more: Any) -> bytes:
        said = {"status": word, "boot": 1, "link": 1, "host": "evil", "run": self.federation.eye.runs[-1].run}
        return NodeStatus.model_validate(said | more).encode()

    def memory(self) -> dict[str, float]:
        """MiB of the server and of the broker."""
        return {"server": resident_mib(self.server.pid), "broker": self.guarded.memory_mib()}

    @property
    def logged_bytes(self) -> int:
        return self.server.config.with_suffix(".log").stat().st_size

    @property
    def flagged(self) -> bool:
        whys = ("over budget", "raises terms", "silent", *map(in_words, Verdict))
        return any(self.server.said(f"flagged: {why}", node=EVIL) for why in whys)


# --- attacks ----------------------------------------------------------------------------------------------------------


async def first_comer(scene: Scene) -> None:
    """H1: it answers each round, first of all, with a projected gradient of 1e15."""
    async with scene.evil(TOPICS.round) as evil:
        evil.session.publish(TOPICS.up(EVIL, "status"), scene.status(), retain=True)
        while True:
            await until(lambda: evil.messages, within_s=60.0)
            frame = decode(evil.messages.pop().payload)
            evil.messages.clear()
            if isinstance(frame, Round) and frame.entries:
                update = Update(frame.header, 1, frame.entries[-1].digest[:8], 1.0, (1e15,))
                evil.session.publish(TOPICS.up(EVIL, "update"), encode(update))


async def fill_the_broker(scene: Scene) -> None:
    """H2: retained messages of the largest size, on its own topics and below them."""
    chunk = bytes(130_000)
    kinds = ("status", "update", "want")
    scene.federation.eye.noise.add(chunk)
    while True:
        with contextlib.suppress(Exception):
            async with scene.evil() as evil:
                for number in range(100):
                    evil.session.publish(TOPICS.up(EVIL, kinds[number % 3]), chunk, retain=True)  # type: ignore[arg-type]
                    evil.session.publish(f"{TOPICS.root}/up/{EVIL}/{number}", chunk, retain=True)
                    await asyncio.sleep(TICK_S)


async def take_client_ids(scene: Scene) -> None:
    """H3: it connects under the names of the others."""
    state = scene.federation.eye.states[-1]
    names = [f"meerkat-f-server-{state.server_id}", "meerkat.server", *(f"meerkat-f-node-{n}" for n in range(7))]
    while True:
        async with scene.evil(name=random.choice(names)):
            await asyncio.sleep(TICK_S)


async def come_back_revoked(scene: Scene) -> None:
    """H4: its certificate is revoked, as documented, and it connects again and again."""
    await scene.guarded.revoke(EVIL)
    while True:
        with contextlib.suppress(OSError, EOFError):
            await Raw.connected(scene.guarded, f"nodes/{EVIL}", EVIL)
            raise AssertionError("a revoked certificate is taken")
        await asyncio.sleep(TICK_S)


async def connect_again_and_again(scene: Scene) -> None:
    """H5: connections without end."""
    ends = (asyncio.open_connection("127.0.0.1", scene.guarded.port) for _ in range(200))
    opened = await asyncio.gather(*ends)
    while True:
        async with scene.evil():
            await asyncio.sleep(TICK_S)
        assert opened


async def forge_terms(scene: Scene) -> None:
    """H6: a want of 33 bytes, one term above the server's, four times a second."""
    async with scene.evil() as evil:
        while True:
            evil.session.publish(TOPICS.up(EVIL, "want"), encode(Want(scene.header(1), 1)))
            await asyncio.sleep(0.25)


async def want_welcomes(scene: Scene) -> None:
    """H7: 800 wants a second, each of which is answered with a welcome and an announcement."""
    async with scene.evil() as evil:
        for word in ("online", "stopped"):  # only who is known is welcome; and this is no attack by silence
            await evil.session.publish(TOPICS.up(EVIL, "status"), scene.status(word), retain=True)
        while True:
            for _ in range(round(800 * TICK_S)):
                evil.session.publish(TOPICS.up(EVIL, "want"), encode(Want(scene.header(), 1, welcome=True)))
            await asyncio.sleep(TICK_S)


async def want_chunks(scene: Scene) -> None:
    """H7: 40 wants a second for all chunks of the mask."""
    run = scene.federation.eye.runs[-1]
    chunks = tuple(range(run.mask_chunks))
    async with scene.evil(TOPICS.reply(EVIL)) as evil:
        while True:
            want = Want(scene.header(), 1, blob=run.mask_name, chunks=chunks)
            evil.session.publish(TOPICS.up(EVIL, "want"), encode(want))
            evil.messages.clear()
            await asyncio.sleep(1 / 40)


async def announce_noise(scene: Scene) -> None:
    """H7: displacements of noise: announced, asked for, sent, and thrown away by the server, again and again."""
    async with scene.evil(TOPICS.reply(EVIL), TOPICS.round) as evil:
        evil.session.publish(TOPICS.up(EVIL, "status"), scene.status(), retain=True)
        newest: Round | None = None
        for number in itertools.count():
            blob = number.to_bytes(8, "little") * 8000
            await asyncio.sleep(TICK_S / 10)
            for message in evil.messages:
                frame = decode(message.payload)
                if isinstance(frame, Round) and frame.entries:
                    newest = frame
            evil.messages.clear()
            if newest is None:
                continue
            values = Values(short_hash(blob), len(blob), 1)
            announced = Update(newest.header, 1, newest.entries[-1].digest[:8], 1.0, (), values=values)
            evil.session.publish(TOPICS.up(EVIL, "update"), encode(announced))
            with contextlib.suppress(AssertionError):
                await until(lambda: any(message.topic == TOPICS.reply(EVIL) for message in evil.messages), within_s=1.0)
                for chunk in split(newest.header, short_hash(blob), blob):
                    evil.session.publish(TOPICS.up(EVIL, "update"), encode(chunk))


async def say_nothing(scene: Scene) -> None:
    """H8: "online", and nothing else."""
    async with scene.evil() as evil:
        evil.session.publish(TOPICS.up(EVIL, "status"), scene.status(), retain=True)
        await asyncio.Event().wait()


async def sleep_for_a_week(scene: Scene) -> None:
    """H8: "asleep for a week"."""
    async with scene.evil() as evil:
        await evil.session.publish(TOPICS.up(EVIL, "status"), scene.status(), retain=True)
        evil.session.publish(TOPICS.up(EVIL, "status"), scene.status("asleep", wakes_in_s=7 * 86_400), retain=True)
        await asyncio.Event().wait()


async def send_junk(scene: Scene) -> None:
    """H19: 640 messages a second that do not decode, or belong elsewhere."""
    chance, kinds = random.Random(7), ("status", "update", "want")
    junk = [b"{", bytes(40), chance.randbytes(60), scene.status()[:30]]
    junk.append(encode(Round(scene.header(), True, 1, 1, 0.5, 1000)))
    scene.federation.eye.noise |= set(junk)
    async with scene.evil() as evil:
        while True:
            for number in range(round(640 * TICK_S)):
                evil.session.publish(TOPICS.up(EVIL, kinds[number % 3]), chance.choice(junk))  # type: ignore[arg-type]
            await asyncio.sleep(TICK_S)


async def invent_ids(scene: Scene) -> None:
    """H21: births of nodes that are not there."""
    number = 0
    async with scene.evil() as evil:
        while True:
            for _ in range(round(1000 * TICK_S)):
                number += 1
                evil.session.publish(TOPICS.up(f"ghost-{number}", "status"), scene.status(), retain=True)
            await asyncio.sleep(TICK_S)


Attack = Callable[[Scene], Awaitable[None]]
ATTACKS: dict[str, Attack] = {
    "H1": first_comer,
    "H2": fill_the_broker,
    "H3": take_client_ids,
    "H4": come_back_revoked,
    "H5": connect_again_and_again,
    "H6": forge_terms,
    "H7 welcomes": want_welcomes,
    "H7 chunks": want_chunks,
    "H7 noise": announce_noise,
    "H8 online": say_nothing,
    "H8 asleep": sleep_for_a_week,
    "H19": send_junk,
    "H21": invent_ids,
}
AT_THE_BROKER = ("H2", "H3", "H4", "H5", "H21")  # the broker stops them, and its log names the certificate


# --- what they cost ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Of one attack: paces in rounds a second, memory as a multiple of what it was."""

    calm: float
    during: float
    memory: dict[str, float]
    logged_a_s: float
    flagged_s: float | None
    flagged_rounds: int | None
    ended: int

    @property
    def part(self) -> float:
        return self.during / self.calm

    def holds(self, name: str) -> bool:
        """Whether what docs/threat-model.md promises holds: half the pace, twice the memory, nobody ends, flagged."""
        flagged = name in AT_THE_BROKER or (self.flagged_s is not None and self._soon(self.flagged_s))
        return self.part >= 0.5 and self.ended == 0 and max(self.memory.values()) < 2 and flagged

    def _soon(self, flagged_s: float) -> bool:
        return flagged_s <= 20.0 or (self.flagged_rounds or 0) <= 20


@contextlib.asynccontextmanager
async def scene_of(folder: Path, honest: int) -> AsyncIterator[Scene]:
    """Hardened Mosquitto, a server, and so many honest nodes that have answered a few rounds."""
    guarded = Guarded(folder)
    for name in [f"node-{number}" for number in range(8)]:
        if not (guarded.certificates / "nodes" / name).exists():
            guarded.issue(f"nodes/{name}", days=30)
    guarded.broker.start()
    try:
        async with Federation(folder, guarded.way("observer")) as federation:
            names = [f"node-{number}" for number in range(honest)]
            nodes = [federation.node(name, broker=guarded.table(f"nodes/{name}")) for name in names]
            server = federation.server(
                rounds=ROUNDS | {"min_nodes": honest, "directions": 1},
                toy_weights=WEIGHTS,
                values={"accept": True},
                broker=guarded.table("server"),
            )
            await server.says("round closed", heard=honest, times=3)
            yield Scene(guarded, federation, server, nodes)
    finally:
        guarded.broker.kill()


async def cost_of(scene: Scene, attack: Attack, calm_s: float, attack_s: float) -> Cost:
    """Leave the scene alone, then attack it."""
    now = asyncio.get_running_loop().time
    first, began = scene.version, now()
    await asyncio.sleep(calm_s)
    calm, before = (scene.version - first) / (now() - began), scene.memory()
    most, flagged = dict(before), (None, None)
    first, began, logged = scene.version, now(), scene.logged_bytes
    task = asyncio.ensure_future(attack(scene))
    while now() - began < attack_s:
        await asyncio.sleep(0.2)
        most = {name: max(most[name], mib) for name, mib in scene.memory().items()}
        if flagged[0] is None and scene.flagged:
            flagged = now() - began, scene.version - first  # type: ignore[assignment]
        if task.done():
            task.result()
    during, logged_a_s = (scene.version - first) / (now() - began), (scene.logged_bytes - logged) / (now() - began)
    await ended(task)
    rounds = scene.version
    await until(lambda: scene.version > rounds, within_s=60.0)
    memory = {name: mib / before[name] for name, mib in most.items()}
    over = sum(service.over for service in (scene.server, *scene.nodes))
    return Cost(calm, during, memory, logged_a_s, *flagged, over)


async def ended(task: asyncio.Future[None]) -> None:
    """End an attack; a session that it is just leaving swallows what would cancel it."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=1.0)


async def measure(name: str, calm_s: float, attack_s: float) -> Cost:
    with tempfile.TemporaryDirectory() as folder:
        async with scene_of(Path(folder), 7) as scene:
            return await cost_of(scene, ATTACKS[name], calm_s, attack_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    print("| attack | rounds/s before | during | part | server | broker | log kB/s | flagged after | ended | holds |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    all_hold = True
    for name in args.attacks:
        cost = asyncio.run(measure(name, min(20.0, args.seconds), args.seconds))
        all_hold &= cost.holds(name)
        flagged = "–" if cost.flagged_s is None else f"{cost.flagged_s:.1f} s, {cost.flagged_rounds} rounds"
        print(
            f"| {name} | {cost.calm:.1f} | {cost.during:.1f} | {cost.part:.2f} | {cost.memory['server']:.2f} × | "
            f"{cost.memory['broker']:.2f} × | {cost.logged_a_s / 1000:.1f} | {flagged} | {cost.ended} | "
            f"{'yes' if cost.holds(name) else 'NO'} |",
            flush=True,
        )
    sys.exit(not all_hold)


if __name__ == "__main__":
    main()
