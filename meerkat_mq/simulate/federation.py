"""A federation on a virtual clock: a disk, a broker, servers, nodes; and the hands that start and restore them."""

from functools import cache
from itertools import takewhile

from meerkat_mq.config import Codec, EarlyStoppingConfig, ServerValuesConfig
from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.toy import toy_mask
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.simulate.broker import Broker
from meerkat_mq.simulate.durable import Disk, Ledger, Theta
from meerkat_mq.simulate.history import History
from meerkat_mq.simulate.node import Habits, Node
from meerkat_mq.simulate.schedule import Schedule, ScheduledFault
from meerkat_mq.simulate.server import Server
from meerkat_mq.simulate.world import Clock, Process

RUN = bytes(range(16))
WEIGHTS = 8
CODECS: tuple[Codec, ...] = ("int8", "float32", "bfloat16")
STREAM = "mk1"
# Thresholds that about half of the made-up paths pass, so that there is something to get wrong.
THRESHOLDS = EarlyStoppingConfig(initial=0.5, later=0.5, rho_later=1.0, rho_quiet=0.25, quiet=0.7, random_share=0.4)


@cache
def _mask() -> tuple[Mask, bytes]:
    mask = toy_mask(WEIGHTS)
    return mask, mask.hash


def settings_of(schedule: Schedule) -> RoundSettings:
    """The rules of a schedule's rounds."""
    return RoundSettings(
        run_id=RUN,
        mask_hash=_mask()[1],
        count=schedule.rounds,
        local_steps=schedule.steps,
        directions=schedule.lanes,
        lr=0.1,
        eps=2.0**-10,
        min_nodes=schedule.min_nodes,
        min_updates=1,
        fraction=schedule.fraction,
        quorum=schedule.quorum,
        deadline_s=schedule.deadline_s,
        grace_s=schedule.grace_s,
        weigh_by_rows=schedule.weigh_by_rows,
        aggregate=schedule.aggregate,
        snapshot_every=schedule.snapshot_every,
        digest_every=schedule.digest_every,
        perturbations=schedule.perturbations,
        early_stopping=THRESHOLDS.model_copy(
            update={
                "by": schedule.early_stopping,
                "calibration_steps": schedule.calibration_steps,
                "every": schedule.every,
            }
        ),
        measured=schedule.measure_s is not None,
        mode=schedule.mode,
        buffer_size=schedule.buffer_size,
        max_staleness=schedule.max_staleness if schedule.mode == "buffered" else 0,
        staleness=schedule.staleness,
        values=ServerValuesConfig(accept=schedule.values > 0),
    )


class Federation:
    """All that a schedule's faults strike.

    Attributes:
        server: the one started last.
    """

    def __init__(self, schedule: Schedule) -> None:
        mask, _ = _mask()
        self.schedule = schedule
        self.clock = Clock(schedule.seed)
        self.broker = Broker(self.clock, wire=schedule.wire)
        settings = settings_of(schedule)
        self.history = History(RUN, mask, STREAM, schedule.digest_every, settings)
        self.disk = Disk(Ledger(settings.max_staleness))
        self.theta_0 = Theta(mask.theta_0, 0)
        self.nodes = {f"n{number}": self._node(number) for number in range(schedule.nodes)}
        self.server: Server
        self._servers: list[Server] = []
        self._backups: dict[ScheduledFault, Ledger] = {}

    def _node(self, number: int) -> Node:
        chance, schedule = self.clock.random, self.schedule
        slow = schedule.slow and number == schedule.nodes - 1
        just_in_time = schedule.deadline_s - 0.04 - schedule.commit_s / 2  # the update comes, but is not yet committed
        slower = schedule.spread ** (number / (schedule.nodes - 1))
        habits = Habits(
            latency_s=chance.uniform(0.001, 0.05),
            step_s=just_in_time if slow else schedule.step_s * chance.uniform(1.0, 1.5) * slower,
            rows=1 + 3 * number,
            fickle=schedule.fickle,
            keeps=schedule.keeps,
            reluctant=schedule.reluctant and number == 0,
            codec=CODECS[number % len(CODECS)] if number < schedule.values else None,
            every_s=schedule.every_s if number < schedule.sleepers else 0.0,
        )
        return Node(f"n{number}", self.clock, self.broker, self.history, self.theta_0, habits=habits)

    def start(self) -> None:
        """Start a server, then every node."""
        self.start_server()
        for number, node in enumerate(self.nodes.values()):
            self.clock.at(0.01 * number, self.revive, node)

    def start_server(self) -> None:
        """Start a server on the disk; those that there are know nothing of it."""
        server_id = f"{self.clock.random.getrandbits(64):016x}"
        self.server = Server(
            server_id,
            self.clock,
            self.broker,
            self.history,
            disk=self.disk,
            theta_0=self.theta_0,
            commit_s=self.schedule.commit_s,
            measure_s=self.schedule.measure_s or 0.0,
        )
        self._servers.append(self.server)
        self.server.start()

    def revive(self, process: Process) -> None:
        """Start what is not alive; a server that wakes later may be fenced, so only the newest counts."""
        if isinstance(process, Node):
            if not process.alive:
                process.start()
        elif not self.server.alive:
            self.start_server()

    def thaw_servers(self) -> None:
        """Let every frozen server go on."""
        for server in self._servers:
            if server.frozen:
                server.client.cut = False
                server.thaw()

    def take_backup(self, fault: ScheduledFault) -> None:
        """Copy the ledger, for `restore`."""
        self._backups[fault] = self.disk.ledger.backup()

    def restore(self, fault: ScheduledFault) -> None:
        """Stop every server, and put an earlier ledger in place."""
        for server in self._servers:
            if server.alive:
                server.kill()
        undone, self.disk.ledger = self.disk.ledger, self._backups[fault].backup()
        both = zip(undone.entries, self.disk.ledger.entries, strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
        self.history.backups.append((self.clock.now, shared))

    def heal(self) -> None:
        """Everybody is there, and every link carries."""
        self.broker.up = True
        self.thaw_servers()
        self.revive(self.server)
        for node in self.nodes.values():
            if node.frozen:
                node.client.cut = False
                node.thaw()
            self.revive(node)
        everybody: list[Server | Node] = [*self._servers, *self.nodes.values()]
        for process in everybody:
            process.crash_in = None
            process.client.cut, process.client.weather = False, None
            self.broker.break_link(process.client)

    @property
    def finished(self) -> bool:
        """Whether the ledger is full, and a server that can say so has said it."""
        return len(self.disk.ledger.entries) >= self.schedule.rounds and any(
            server.alive and server.machine is not None and server.machine.finished for server in self._servers
        )

    def close(self) -> History:
        """The history, with the final ledger."""
        history, ledger = self.history, self.disk.ledger
        history.entries, history.records, history.terms = ledger.entries, ledger.records, ledger.terms
        history.entry_terms = ledger.entry_terms
        history.products, history.judgements = ledger.products, ledger.judgements
        history.open_updates, history.blobs = tuple(ledger.updates.values()), ledger.blobs
        history.finished = self.finished
        return history
