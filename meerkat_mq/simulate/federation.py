"""A federation on a virtual clock: a ledger, a broker, servers, nodes; and the hands that start and restore them."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile

from meerkat_mq.core.path import Entry
from meerkat_mq.errors import MeerkatError
from meerkat_mq.simulate.history import History
from meerkat_mq.simulate.node import SimulatedNode
from meerkat_mq.simulate.reached import CRASHED, EARLIER, OVERDUE, WITHOUT, Reached
from meerkat_mq.simulate.schedule import Schedule, ScheduledFault, mask
from meerkat_mq.wire.descriptor import NodeStatus, ServerState, decode_control
from meerkat_mq.wire.limits import largest_frame
from meerkat_mq.wire.messages import Chunk, Frame, Round, Update
from meerkat_mq.wire.topics import Topics
from meerkat_mq.worlds.broker import Broker, VirtualMessage
from meerkat_mq.worlds.clock import VirtualClock
from meerkat_mq.worlds.ledger import MemoryLedger
from meerkat_mq.worlds.replica import Thetas
from meerkat_mq.worlds.run import FEDERATION, make_run
from meerkat_mq.worlds.server import ServerProcess
from meerkat_mq.worlds.store import MemoryStore
from meerkat_mq.worlds.world import World

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
        lost: nodes that take no part any more.
        saw_chunk: is called for each chunk that reaches the broker, just before it goes to others.
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
        self.lost: set[str] = set()
        self.saw_chunk: Callable[[VirtualMessage, Chunk], None] = lambda message, chunk: None
        self.errors: list[tuple[str, MeerkatError]] = []
        run = make_run(settings, mask())
        self.world = World(self.clock, self.broker, run, Thetas(run, THETAS), self._failed, self._count)
        self.nodes = {
            f"n{number}": SimulatedNode(number, self.world, schedule, self.chance) for number in range(schedule.nodes)
        }
        self.servers: list[ServerProcess] = []
        self._backups: dict[ScheduledFault, MemoryLedger] = {}
        self._is_healed = False
        self._flipped: dict[Entry, Entry] = {}  # as it is in the ledger, and as it was

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
        if isinstance(frame, Chunk):
            self.saw_chunk(message, frame)
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
            judge_s=self.schedule.judge_s,
            latency_s=SERVER_LATENCY_S,
            largest=self.schedule.packet_bytes,
        )
        self.servers.append(server)
        server.start()

    def revive(self, process: ServerProcess | SimulatedNode) -> None:
        """Start what is not alive; a server that wakes later may be fenced, so only the newest counts."""
        self.reached[CRASHED] += process.crash_in is not None and process.crash_in < 0
        if isinstance(process, SimulatedNode):
            if not process.alive and process.name not in self.lost:
                process.start()
        elif not self.server.alive:
            self.start_server()

    def thaw(self, *processes: ServerProcess | SimulatedNode) -> None:
        """Let those that are frozen go on."""
        for process in processes:
            if process.frozen:
                process.client.cut = False
                process.thaw()

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
        # By when and in which term they closed too: after another restore, other nodes may have led to an equal entry.
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
        self.history.backups.append((self.clock.now(), shared))

    def heal(self) -> None:
        """Everybody is there, and every link carries, but of nodes that are lost."""
        self.broker.up = self._is_healed = True
        self.unflip()
        spared = [node for name, node in self.nodes.items() if name not in self.lost]
        processes: list[ServerProcess | SimulatedNode] = [*self.servers, *spared]
        self.thaw(*processes)
        for process in processes:
            self.revive(process)
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

    def _stuck(self) -> str:
        """What the run waits for, for people."""
        machine = self.server.machine
        if not self.server.alive or machine is None:
            return "the server has ended" if not self.server.alive else "the server has no term"
        faults = [fault for fault in self.schedule.faults if fault.lasts == math.inf]
        lasting = {fault.target: f", {fault.name} for good" for fault in faults}
        waits = [f"{name} ({self._state(name)}{lasting.get(name, '')})" for name in self._awaited()]
        disk = ["its full disk"] * self.ledger.is_full
        return f"the server is {machine.phase.name.lower()}, and waits for {', '.join(disk + waits) or 'nobody'}"

    def _state(self, name: str) -> str:
        return self.nodes[name].state if name in self.nodes else "never answered a round"

    def _awaited(self) -> list[str]:
        """Whom the open round asks that has not answered; where none is open, who is not there."""
        frame = self.history.rounds[-1][1] if self.history.rounds else None
        if frame is not None and frame.is_open:
            return [self.ledger.slots.get(slot, f"slot {slot}") for slot in sorted(frame.asked - frame.heard)]
        return [name for name, node in self.nodes.items() if not node.alive or node.client.link is None]

    def close(self) -> History:
        """The history, with the final ledger."""
        history = self.history
        history.take_ledger(MemoryStore(self.ledger))
        history.finished, history.stuck = self.finished, self._stuck()
        for node in self.nodes.values():
            node.end_count()
        self.reached.saw_ledger(history)
        self.reached[OVERDUE] += sum(closed.overdue for closed in self.ledger.entries.values())
        self.reached[WITHOUT] += bool(history.finished and self.lost)
        self.reached[EARLIER] += bool(self.schedule.earlier and history.took("n0"))
        history.reached = self.reached
        return history
