"""A federation of real processes, and an eye on what it says."""

import asyncio
import contextlib
import json
import os
import signal
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tomli_w

from meerkat_mq.config import BrokerConfig
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.wire.descriptor import NodeStatus, RunDescriptor, ServerState, decode_control
from meerkat_mq.wire.frames import decode
from meerkat_mq.wire.messages import Round, Want
from meerkat_mq.wire.snapshot import Difference
from meerkat_mq.wire.topics import Topics
from tests.support.forked import Forked
from tests.support.peer import Peer
from tests.support.waiting import until

PATIENCE_S = 60.0
NAME = "f"
TOPICS = Topics(NAME)
PACE = {"count": 1_000_000, "quorum": 0.5, "deadline_s": 0.2}
_FORBIDDEN = 'raise AssertionError("imported by a process that has no model")\n'


class Service:
    """A server or node process, started as a module; what it logged, as it comes."""

    def __init__(self, module: str, config: Path, flags: Sequence[str], environment: Mapping[str, str]) -> None:
        self.config = config
        self._log = config.with_suffix(".log")
        self._events: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        self._other: list[str] = []
        self._read = 0
        arguments = ["--config", str(config), "--json-logs", *flags]
        self._process = Forked(module, arguments, self._log, {**os.environ, "OMP_NUM_THREADS": "1", **environment})

    def _follow(self) -> None:
        with self._log.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode().splitlines():
            if line.startswith("{"):
                found = json.loads(line)
                self._events[found["event"]].append(found)
            else:
                self._other.append(line)

    def said(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """Log lines of this event with these fields, oldest first."""
        self._follow()
        return [line for line in self._events[event] if all(line.get(key) == fields[key] for key in fields)]

    @property
    def plain(self) -> list[str]:
        """Lines on stderr and stdout that are no log lines."""
        self._follow()
        return self._other

    async def says(self, event: str, *, times: int = 1, within_s: float = PATIENCE_S, **fields: Any) -> dict[str, Any]:
        """Wait for the n-th such log line."""
        await until(lambda: len(self.said(event, **fields)) >= times or self.over, within_s=within_s)
        found = self.said(event, **fields)
        assert len(found) >= times, (event, fields, self.plain, list(self._events))
        return found[times - 1]

    @property
    def over(self) -> bool:
        return self._process.code is not None

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ended(self, within_s: float = PATIENCE_S) -> int:
        """Wait for the end; the exit code."""
        await until(lambda: self.over, within_s=within_s)
        self._follow()
        assert self._process.code is not None
        return self._process.code

    async def failed(self, exit_code: int, *words: str, within_s: float = PATIENCE_S) -> None:
        """It ends with this code and one line, without traceback, that holds these words."""
        assert await self.ended(within_s) == exit_code, self.plain
        assert len(self.plain) == 1, self.plain
        assert self.plain[0].startswith("meerkat: ")
        for word in words:
            assert word in self.plain[0]

    def signal(self, number: signal.Signals) -> None:
        self._process.signal(number)

    def stop(self) -> None:
        """SIGTERM."""
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        self._process.kill()


class Federation:
    """Configures and starts processes; none outlives the test."""

    def __init__(self, folder: Path, broker: BrokerConfig, *, models: bool = False) -> None:
        self.folder = folder
        self.broker = broker
        self.eye = Eye(broker.model_copy(update={"max_packet_bytes": 2**20}))
        self._services: list[Service] = []
        self._environment = {} if models else {"PYTHONPATH": str(self._without_torch())}

    async def __aenter__(self) -> Self:
        await self.eye.connected()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for service in self._services:
            service.kill()
        await self.eye.leave()

    def _without_torch(self) -> Path:
        """A folder on the path of toy processes that makes an import of torch fail."""
        folder = self.folder / "without-torch"
        for name in ("torch", "transformers"):
            (folder / name).mkdir(parents=True)
            (folder / name / "__init__.py").write_text(_FORBIDDEN)
        return folder

    def server(
        self, *flags: str, name: str = "server", rounds: Mapping[str, Any], module: str = "meerkat_mq.server",
        environment: Mapping[str, str] | None = None, **settings: Any,
    ) -> Service:  # fmt: skip
        """Start a server with the toy engine; `difference` and `ledger` read what it leaves."""
        table = {"federation": NAME, "state_dir": name, "engine": "toy", **settings}
        table |= {"rounds": {"batch_size": 4, "lr": 0.05, "min_updates": 1, **rounds}}
        return self._start(module, name, flags, table, environment or {})

    def node(
        self, node: str, *, name: str = "", seed: int = 7, module: str = "meerkat_mq.node",
        environment: Mapping[str, str] | None = None, **settings: Any,
    ) -> Service:  # fmt: skip
        """Start a node; `name` is that of its files, where two have one id. All its rows are alike."""
        name = name or node
        (self.folder / f"{name}.jsonl").write_text(f'{{"seed": {seed}}}\n' * 8)
        table = {"id": node, "federation": NAME, "state_dir": name, "data": f"{name}.jsonl", **settings}
        return self._start(module, name, (), table, environment or {})

    def _start(
        self, module: str, name: str, flags: Sequence[str], table: Mapping[str, Any], environment: Mapping[str, str]
    ) -> Service:
        config = self.folder / f"{name}.toml"
        config.write_text(tomli_w.dumps({**table, "broker": {"url": self.broker.url, **table.get("broker", {})}}))
        service = Service(module, config, flags, {**self._environment, **environment})
        self._services.append(service)
        return service

    @contextlib.contextmanager
    def ledger(self, name: str = "server") -> Iterator[Ledger]:
        """A server's ledger, to read."""
        with contextlib.closing(Ledger.read(self.folder / name / LEDGER_FILE)) as ledger:
            yield ledger

    def difference(self, name: str = "server") -> Difference:
        return Difference.load(self.folder / name / "difference.mkd")

    async def retain(self, topic: str, payload: bytes) -> None:
        """Put a message onto one of the federation's topics, as anybody might; the eye overlooks it."""
        self.eye.noise.add(payload)
        await self.eye.session.publish(f"{TOPICS.root}/{topic}", payload, retain=True)

    async def ghost(self, version: int = 0, name: str = "ghost") -> None:
        """A node that is online and never answers: rounds at PACE then close at their deadline only.

        It says that it stands at `version` already; with the last one, the server does not wait for its last words.
        """
        status = NodeStatus(status="online", boot=1, link=1, host="nowhere", version=version)
        self.eye.ghosts[TOPICS.up(name, "status")] = status.encode()
        await self.eye.session.publish(TOPICS.up(name, "status"), status.encode(), retain=True)


class Eye(Peer):
    """Sees what the federation says; decoded, in order of arrival."""

    def __init__(self, broker: BrokerConfig) -> None:
        self.states: list[ServerState] = []
        self.runs: list[RunDescriptor] = []
        self.rounds: list[Round] = []
        self.statuses: dict[str, list[NodeStatus]] = {}
        self.noise: set[bytes] = set()
        self.wants: dict[str, list[Want]] = {}
        self.ghosts: dict[str, bytes] = {}
        filters = [TOPICS.server, TOPICS.run, TOPICS.round, TOPICS.up("+", "status"), TOPICS.up("+", "want")]
        super().__init__(broker, "eye", [(topic, 1) for topic in filters], react=self._see)

    def _see(self, message: Any) -> None:
        if message.payload == b"" or message.payload in self.noise:
            return
        if message.topic == TOPICS.server:
            state = decode_control(message.payload, ServerState)
            if state.term > max((earlier.term for earlier in self.states), default=0):
                for topic, birth in self.ghosts.items():  # as nodes do: not every broker kept it for the server
                    self.session.publish(topic, birth, retain=True)
            self.states.append(state)
        elif message.topic == TOPICS.run:
            self.runs.append(decode_control(message.payload, RunDescriptor))
        elif message.topic == TOPICS.round:
            frame = decode(message.payload)
            assert isinstance(frame, Round)
            self.rounds.append(frame)
        else:
            node, kind = TOPICS.parse_up(message.topic) or ("", "")
            if kind == "status":
                self.statuses.setdefault(node, []).append(decode_control(message.payload, NodeStatus))
            else:
                frame = decode(message.payload)
                assert isinstance(frame, Want)
                self.wants.setdefault(node, []).append(frame)

    @property
    def version(self) -> int:
        """Of the newest round."""
        return max((frame.header.version for frame in self.rounds), default=0)

    async def digest(self, version: int) -> bytes:
        """theta's, as an entry in a round frame says."""

        def found() -> set[bytes]:
            return {e.digest for frame in self.rounds for e in frame.entries if e.version + 1 == version}

        await until(found, within_s=PATIENCE_S)
        (digest,) = found()
        return digest

    async def reaches(self, version: int) -> None:
        await until(lambda: self.version >= version, within_s=PATIENCE_S)

    async def sees_states(self, count: int) -> None:
        """Wait until the server has said its state so many times."""
        await until(lambda: len(self.states) >= count, within_s=PATIENCE_S)

    async def follows(self, term: int) -> ServerState:
        """Wait until a server of this term is online, and its run described."""

        def followed() -> bool:
            standing = [(state.term, state.run) for state in self.states[-1:]]
            return standing == [(term, run.run) for run in self.runs[-1:]] != []

        await until(followed, within_s=PATIENCE_S)
        return await self.state("online")

    async def state(self, status: str) -> ServerState:
        """Wait until the server's state says this."""
        await until(lambda: self.states and self.states[-1].status == status, within_s=PATIENCE_S)
        return self.states[-1]

    async def status(self, node: str, status: str) -> NodeStatus:
        """Wait until a node's state says this."""
        await until(lambda: [s.status for s in self.statuses.get(node, [])][-1:] == [status], within_s=PATIENCE_S)
        return self.statuses[node][-1]


async def all_end(*services: Service) -> list[int]:
    return list(await asyncio.gather(*(service.ended() for service in services)))
