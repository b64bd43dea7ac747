"""A federation on a virtual clock: a ledger, a broker, servers, nodes; and the hands that start and restore them."""

import random
from dataclasses import replace
from itertools import takewhile

from meerkat_mq.config import Codec
from meerkat_mq.core.path import Entry
from meerkat_mq.errors import MeerkatError
from meerkat_mq.simulate.history import History
from meerkat_mq.simulate.node import SimulatedNode, SimulatedProfile
from meerkat_mq.simulate.reached import CRASHED, Reached
from meerkat_mq.simulate.schedule import Schedule, ScheduledFault, mask
from meerkat_mq.wire.descriptor import NodeStatus, ServerState, decode_control
from meerkat_mq.wire.limits import largest_frame
from meerkat_mq.wire.messages import Frame, Round, Update
from meerkat_mq.wire.topics import Topics
from meerkat_mq.worlds.broker import Broker, VirtualMessage
from meerkat_mq.worlds.clock import VirtualClock
from meerkat_mq.worlds.ledger import MemoryLedger
from meerkat_mq.worlds.replica import Thetas
from meerkat_mq.worlds.run import FEDERATION, make_run
from meerkat_mq.worlds.server import ServerProcess
from meerkat_mq.worlds.store import MemoryStore
from meerkat_mq.worlds.world import World

CODECS: tuple[Codec, ...] = ("int8", "float32", "bfloat16")
SERVER_LATENCY_S = 0.004
THETAS = 256  # that are not computed twice
RESTART_S = 5.0  # after which a supervisor starts again what an error has ended
TOPICS = Topics(FEDERATION)


class Federation:
    """All that a schedule's faults strike.

    Attributes:
        server: the one started last.
        servers: all of them.
        reached: what was met.
        errors: (who, error) of what ended a process.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.chance = random.Random(schedule.seed)  # noqa: S311 - chance to be repeated, not to be secret
        self.clock = VirtualClock()
        self.broker = Broker(self.clock, self.chance, routed=self._saw)
        room = largest_frame(schedule.packet_bytes, TOPICS)
        settings = schedule.settings.model_copy(update={"frame_bytes": room})
        self.history = History(mask(), settings)
        self.ledger = MemoryLedger()
        self.reached = Reached()
        self.errors: list[tuple[str, MeerkatError]] = []
        run = make_run(settings, mask())
        self.world = World(self.clock, self.broker, run, Thetas(run, THETAS), self._failed, self._count)
        self.nodes = {f"n{number}": self._node(number) for number in range(schedule.nodes)}
        self.servers: list[ServerProcess] = []
        self._backups: dict[ScheduledFault, MemoryLedger] = {}
        self._is_healed = False
        self._flipped: dict[Entry, Entry] = {}  # as it is in the ledger, and as it was

    def _node(self, number: int) -> SimulatedNode:
        chance, schedule = self.chance, self.schedule
        slow = schedule.slow and number == schedule.nodes - 1
        just_in_time = (
            schedule.settings.deadline_s - 0.04 - schedule.commit_s / 2
        )  # the update comes, but is not yet committed
        slower = schedule.spread ** (number / (schedule.nodes - 1))
        profile = SimulatedProfile(
            latency_s=chance.uniform(0.001, 0.05),
            step_s=just_in_time if slow else schedule.step_s * chance.uniform(1.0, 1.5) * slower,
            rows=1 + 3 * number,
            fickle=schedule.fickle,
            keeps=schedule.keeps,
            reluctant=schedule.reluctant and number == 0,
            codec=CODECS[number % len(CODECS)] if number < schedule.values else None,
            every_s=schedule.every_s if number < schedule.sleepers else 0.0,
        )
        return SimulatedNode(f"n{number}", self.world, profile, chance, schedule.packet_bytes)

    # --- what is noted ---

    def _saw(self, message: VirtualMessage) -> None:
        """A message has reached the broker."""
        history, topic, payload = self.history, message.topic, message.payload
        if topic == TOPICS.round:
            frame = self._read(message)
            assert isinstance(frame, Round)
            history.rounds.append((message.sent, frame))
        elif topic == TOPICS.server:
            state = decode_control(payload, ServerState)
            self.reached.saw_status(state.status)
            history.states.append((message.sent, state))
        elif (parsed := TOPICS.parse_up(topic)) is not None:
            self._saw_node(message, *parsed)
        elif topic != TOPICS.run:
            self._read(message)

    def _read(self, message: VirtualMessage) -> Frame:
        frame = self.world.read(message.payload)
        self.reached.saw(message.topic, frame)
        return frame

    def _saw_node(self, message: VirtualMessage, node: str, kind: str) -> None:
        if kind != "status":
            frame = self._read(message)
            if isinstance(frame, Update):
                self.history.saw_update(message.sent, node, frame)
        else:
            status = decode_control(message.payload, NodeStatus)
            self.reached.saw_status(status.status)
            if status.status == "online":
                self.history.saw_status(message.sent, node, status)

    def _count(self, who: str, reason: str) -> None:
        self.reached[reason] += 1

    def _failed(self, who: str, error: MeerkatError) -> None:
        self.errors.append((who, error))
        self.reached.ended(error)
        if self._is_healed:
            self.clock.at(self.clock.now() + RESTART_S, lambda: self.revive(self.nodes.get(who, self.server)))

    # --- people's hands ---

    @property
    def server(self) -> ServerProcess:
        """The one started last."""
        return self.servers[-1]

    @property
    def processes(self) -> list[ServerProcess | SimulatedNode]:
        """All that ever ran."""
        return [*self.servers, *self.nodes.values()]

    def start(self) -> None:
        """Start a server, then every node."""
        self.start_server()
        for number, node in enumerate(self.nodes.values()):
            self.clock.at(0.01 * number, lambda node=node: self.revive(node))  # type: ignore[misc]

    def start_server(self) -> None:
        """Start a server on the ledger; those that there are know nothing of it."""
        server = ServerProcess(
            f"{self.chance.getrandbits(64):016x}",
            self.world,
            self.ledger,
            commit_s=self.schedule.commit_s,
            measure_s=self.schedule.measure_s,
            latency_s=SERVER_LATENCY_S,
            largest=self.schedule.packet_bytes,
        )
        self.servers.append(server)
        server.start()

    def revive(self, process: ServerProcess | SimulatedNode) -> None:
        """Start what is not alive; a server that wakes later may be fenced, so only the newest counts."""
        self.reached[CRASHED] += process.crash_in is not None and process.crash_in < 0
        if isinstance(process, SimulatedNode):
            if not process.alive:
                process.start()
        elif not self.server.alive:
            self.start_server()

    def thaw(self, process: ServerProcess | SimulatedNode) -> None:
        """Let a frozen process go on."""
        if process.frozen:
            process.client.cut = False
            process.thaw()

    def thaw_servers(self) -> None:
        """Let every frozen server go on."""
        for server in self.servers:
            self.thaw(server)

    def take_backup(self, fault: ScheduledFault) -> None:
        """Copy the ledger, once it holds the run, for `restore`."""
        if self.ledger.begun:
            self._backups[fault] = self.ledger.backup()

    def stop_servers(self) -> None:
        """Kill every server."""
        for server in self.servers:
            if server.alive:
                server.kill()

    def flip(self, version: int) -> None:
        """Let a bit of an entry flip on the disk, and of no other."""
        self.unflip()
        closed = self.ledger.entries[version]
        digest = bytes([closed.entry.digest[0] ^ 1]) + closed.entry.digest[1:]
        broken = replace(closed.entry, digest=digest)
        self._flipped[broken] = closed.entry
        self.ledger.entries[version] = replace(closed, entry=broken)

    def unflip(self) -> None:
        """Put back whatever has flipped, as from a good copy."""
        for version, closed in list(self.ledger.entries.items()):
            if (was := self._flipped.get(closed.entry)) is not None:
                self.ledger.entries[version] = replace(closed, entry=was)

    def restore(self, fault: ScheduledFault) -> None:
        """Stop every server, and put an earlier ledger in place, if there is one."""
        if fault not in self._backups:
            return
        self.stop_servers()
        self.unflip()
        undone = list(self.ledger.entries.values())
        self.ledger.restore(self._backups[fault])
        self.unflip()
        both = zip(undone, self.ledger.entries.values(), strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0].entry == pair[1].entry, both))
        self.history.backups.append((self.clock.now(), shared))

    def heal(self) -> None:
        """Everybody is there, and every link carries."""
        self.broker.up = self._is_healed = True
        self.ledger.is_full = False
        self.unflip()
        self.thaw_servers()
        self.revive(self.server)
        for node in self.nodes.values():
            self.thaw(node)
            self.revive(node)
        for process in self.processes:
            process.crash_in, client = None, process.client
            lost, client.cut, client.conditions = client.cut, False, None
            if lost:  # a link that is fine stays: who needs another connection to go on, hangs
                self.broker.break_link(client)

    @property
    def finished(self) -> bool:
        """Whether the ledger is full, and a server that can say so has said it."""
        return len(self.ledger.entries) >= self.schedule.settings.count and any(
            server.alive and server.machine is not None and server.machine.finished for server in self.servers
        )

    def close(self) -> History:
        """The history, with the final ledger."""
        history = self.history
        history.take_ledger(MemoryStore(self.ledger))
        history.finished = self.finished
        for node in self.nodes.values():
            node.end_count()
        self.reached.saw_ledger(history)
        history.reached = self.reached
        return history
