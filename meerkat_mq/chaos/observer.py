"""An observer beside the federation: writes down what goes over the broker, for the checkers."""

import asyncio
import json
import secrets
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from meerkat_mq.config import BrokerConfig
from meerkat_mq.errors import WireError
from meerkat_mq.ledger.folder import mask_of
from meerkat_mq.ledger.run import settings_of
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.ledger.verify import run_of
from meerkat_mq.mqtt import Message, Session
from meerkat_mq.simulate.history import History, Injected
from meerkat_mq.wire.descriptor import NodeStatus, RunDescriptor, ServerState, decode_control
from meerkat_mq.wire.frames import decode
from meerkat_mq.wire.messages import Round, Update
from meerkat_mq.wire.topics import Topics

PACKET_BYTES = 2**20


@dataclass
class Observed:
    """What was seen, each with its time in seconds since the drill began.

    Attributes:
        run: the newest run descriptor.
        state: the newest server state.
        closed: when a round frame first said that this version is reached.
        last_update: of each node, the version of its newest update and when it came.
        statuses: the newest of each node.
        dropped: messages that do not decode.
    """

    run: RunDescriptor | None = None
    state: ServerState | None = None
    rounds: list[tuple[float, Round]] = field(default_factory=list)
    updates: list[tuple[float, str, Update]] = field(default_factory=list)
    all_statuses: list[tuple[float, str, NodeStatus]] = field(default_factory=list)
    states: list[tuple[float, ServerState]] = field(default_factory=list)
    closed: dict[int, float] = field(default_factory=dict)
    last_update: dict[str, tuple[int, float]] = field(default_factory=dict)
    statuses: dict[str, NodeStatus] = field(default_factory=dict)
    dropped: int = 0

    @property
    def version(self) -> int:
        """The newest version that was published."""
        return max(self.closed, default=0)


class Observer:
    """A session directly on the broker; while that is down it misses what happens, as everybody does. Fills `seen`."""

    def __init__(
        self, broker: BrokerConfig, federation: str, clock: Callable[[], float], record: TextIO, seen: Observed
    ) -> None:
        self.seen = seen
        self._news = asyncio.Event()
        self._clock = clock
        self._record = record
        self._topics = topics = Topics(federation)
        filters = [topics.server, topics.run, topics.round, topics.up("+", "status"), topics.up("+", "update")]
        self.session = Session(
            broker.model_copy(update={"max_packet_bytes": PACKET_BYTES}),
            f"meerkat-{federation}-observer-{secrets.token_hex(4)}",
            subscriptions=[(topic, 1) for topic in filters],
            on_message=self._on_message,
        )

    def write(self, line: dict[str, Any]) -> None:
        """Add a line to the record."""
        self._record.write(json.dumps({"time": round(self._clock(), 4), **line}) + "\n")

    async def sees(self, condition: Callable[[], object], within_s: float) -> bool:
        """Whether the condition, which only messages change, comes to hold in time."""
        try:
            async with asyncio.timeout(within_s):
                while not condition():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            return False
        return True

    def _on_message(self, message: Message) -> None:
        self.write({"topic": message.topic, "retained": message.retained, "payload": message.payload.hex()})
        if not message.payload:
            return
        try:
            self._take(message)
        except WireError:
            self.seen.dropped += 1
        self._news.set()

    def _take(self, message: Message) -> None:
        now, seen, payload = self._clock(), self.seen, message.payload
        if message.topic == self._topics.server:
            seen.state = decode_control(payload, ServerState)
            seen.states.append((now, seen.state))
        elif message.topic == self._topics.run:
            seen.run = decode_control(payload, RunDescriptor)
        elif (parsed := self._topics.parse_up(message.topic)) is None:
            frame = decode(payload)
            if isinstance(frame, Round):
                seen.rounds.append((now, frame))
                seen.closed.setdefault(frame.header.version, now)
        elif parsed[1] == "status":
            seen.statuses[parsed[0]] = status = decode_control(payload, NodeStatus)
            seen.all_statuses.append((now, parsed[0], status))
        else:
            frame = decode(payload)
            if isinstance(frame, Update):
                seen.updates.append((now, parsed[0], frame))
                seen.last_update[parsed[0]] = frame.header.version, now


def read_history(seen: Observed, state_dir: Path, faults: list[Injected], *, finished: bool) -> History:
    """What was seen, and the ledger as it is in the end; LedgerError where that cannot be read. Blocks."""
    with closing(Ledger.read(state_dir / LEDGER_FILE)) as ledger:
        run = run_of(ledger)
        mask = mask_of(state_dir, run)
        settings = settings_of(run, ledger.rules, measured=bool(mask.g_p.any()))
        history = History(
            mask=mask,
            settings=settings,
            rounds=seen.rounds,
            states=seen.states,
            faults=faults,
            finished=finished,
        )
        history.take_ledger(ledger)
    for time, node, update in seen.updates:
        history.saw_update(time, node, update)
    for time, node, status in seen.all_statuses:
        history.saw_status(time, node, status)
    return history
