"""The federation of a drill: all that a fault may touch.

Where faults strike passwords or certificates, each service connects with TLS and a certificate of its own to its proxy,
which ends the encryption, so that all other faults still see MQTT packets; to Mosquitto it is known by user name and
password.
"""

import asyncio
import base64
import hashlib
import json
import secrets
import ssl
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Self

import tomli_w
from pydantic import BaseModel

from meerkat_mq.broker.certs import CA, CERTIFICATE, KEY, write_certificates
from meerkat_mq.chaos.processes import Attached, BrokerProcess, Service, WallClock, build_library
from meerkat_mq.chaos.proxy import Proxy
from meerkat_mq.config import BrokerConfig
from meerkat_mq.core.files import write_atomically, writing
from meerkat_mq.errors import ConfigError, MeerkatError

if TYPE_CHECKING:
    from meerkat_mq.chaos.plan import Plan
    from meerkat_mq.chaos.plan_file import AttachPlan

BROKER = "broker"
SERVER = "server"
COMMON_ROWS = 6
OWN_ROWS = 2
HOST = "127.0.0.1"
_USER = "drill"
_HASH_ROUNDS = 101  # Mosquitto's own number


class Credentials:
    """Passwords and certificates, in a folder.

    Attributes:
        passwords: Mosquitto's password store.
        strangers: folder of a certificate for the same address that another CA has signed.
    """

    def __init__(self, folder: Path, federation: str, nodes: Iterable[str]) -> None:
        self.passwords = folder / "passwords"
        self.strangers = folder / "strangers" / "broker"
        self._folder = folder
        self._password = secrets.token_urlsafe(12)
        list(write_certificates(folder, federation=federation, hosts=(HOST,), nodes=list(nodes)))
        list(write_certificates(folder / "strangers", hosts=(HOST,)))
        self.store()

    def store(self, *, empty: bool = False) -> None:
        """Write the password store as it should be, or an empty one; Mosquitto reads it at SIGHUP."""
        salt = secrets.token_bytes(12)
        digest = hashlib.pbkdf2_hmac("sha512", self._password.encode(), salt, _HASH_ROUNDS)
        shown = "$".join(["", "7", str(_HASH_ROUNDS), *(base64.b64encode(part).decode() for part in (salt, digest))])
        write_atomically(self.passwords, b"" if empty else f"{_USER}:{shown}\n".encode(), durable=False)

    def of(self, name: str) -> Path:
        """The folder of a service's CA, certificate and key."""
        nodes = self._folder / "nodes"
        return nodes / name if (nodes / name).exists() else self._folder / "server"

    def way(self, broker: BrokerConfig, name: str | None = None) -> BrokerConfig:
        """The way to a broker with the password, for a service also with its certificate."""
        files = {} if name is None else self._files(self.of(name))
        return broker.model_copy(update={"username": _USER, "password": self._password, **files})

    def context(self) -> ssl.SSLContext:
        """For the proxy of one service: the broker's certificate; clients must have one of the same CA."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(self._folder / "broker" / CA)
        self.show(context)
        return context

    def show(self, context: ssl.SSLContext, *, strangers: bool = False) -> None:
        """Which certificate new connections see: the broker's, or that of a stranger at its address."""
        folder = self.strangers if strangers else self._folder / "broker"
        context.load_cert_chain(folder / CERTIFICATE, folder / KEY)

    def _files(self, folder: Path) -> dict[str, Path]:
        return {"ca_file": folder / CA, "cert_file": folder / CERTIFICATE, "key_file": folder / KEY}


class Stage:
    """Broker, links and processes, by name; used as a context manager.

    Attributes:
        broker: of the drill's own; never started where the federation is attached.
        observed: the way to the broker without a proxy.
        links: by process, the proxy between it and the broker.
        processes: all that may be signalled; `services`: those that the drill started.
        retired: services that ended for good: clones, replaced servers.
    """

    def __init__(self, plan: "Plan", folder: Path) -> None:
        self.observed = BrokerConfig()
        self.links: dict[str, Proxy] = {}
        self.processes: dict[str, Service | Attached] = {}
        self.services: dict[str, Service] = {}
        self.retired: list[Service] = []
        self.folder = folder
        self._plan = plan
        self._open = AsyncExitStack()
        self._credentials: Credentials | None = None
        self._library: Path | None = None
        attach = plan.file.attach
        if plan.server is not None:
            self.federation, self.state_dir = plan.server.federation, plan.server.state_dir
            if plan.needs("secured"):
                self._credentials = Credentials(folder / "credentials", self.federation, plan.nodes)
        else:
            assert attach is not None
            self.federation, self.state_dir = attach.federation, attach.state_dir
        self.broker = BrokerProcess(None if self._credentials is None else self._credentials.passwords)

    async def __aenter__(self) -> Self:
        """Start what is to be started, or listen for what is attached; MeerkatError where that cannot be."""
        try:
            attach = self._plan.file.attach
            await (self._start() if attach is None else self._attach(attach))
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        """End whatever still runs."""
        await asyncio.gather(*(service.close() for service in (*self.services.values(), *self.retired)))
        await self._open.aclose()
        await self.broker.stop()

    @property
    def credentials(self) -> Credentials:
        """Of a federation with passwords and certificates."""
        assert self._credentials is not None
        return self._credentials

    @property
    def everybody(self) -> list[Service]:
        """All services that ever were."""
        return [*self.services.values(), *self.retired]

    def raised(self, name: str) -> str:
        """What a fault raised on this link since the last call, in words; the empty text where nothing was."""
        failures = self.links[name].failures if name in self.links else []
        if not failures:
            return ""
        first, count = failures[0], len(failures)
        failures.clear()
        return f"raised {type(first).__name__}: {first}" + (f" ({count} times)" if count > 1 else "")

    def set_pace(self, latency_s: float) -> None:
        """The latency that every link has without a fault."""
        for link in self.links.values():
            link.latency_s = latency_s

    def clone_of(self, node: str) -> Service:
        """A second process with a node's id and link, and a state of its own; not started."""
        name = f"{node}-clone-{sum(service.name.startswith(f'{node}-clone') for service in self.retired) + 1}"
        config = self._plan.nodes[node]
        assert config is not None
        clone = self._service(name, "node", config.model_copy(update={"state_dir": self.folder / name}), node)
        self.retired.append(clone)
        return clone

    def next_server(self) -> Service:
        """A server on the present one's ledger, which takes its place; not started."""
        number = 2 + sum(service.name.startswith(SERVER) for service in self.retired)
        assert self._plan.server is not None
        second = self._service(f"{SERVER}-{number}", "server", self._plan.server, SERVER, "--replace")
        self.retired.append(self.services[SERVER])
        self.services[SERVER] = self.processes[SERVER] = second
        return second

    async def _start(self) -> None:
        await self.broker.start()
        plan, credentials = self._plan, self._credentials
        if plan.needs("clocked"):
            self._library = await asyncio.to_thread(build_library, self.folder)
        self.observed = self.broker.config if credentials is None else credentials.way(self.broker.config)
        assert plan.server is not None
        for name in (SERVER, *plan.nodes):
            await self._listen(name)
        self.services[SERVER] = self._service(SERVER, "server", plan.server, SERVER)
        for number, (node, config) in enumerate(plan.nodes.items()):
            assert config is not None
            if plan.file.federation.config is None:
                _write_rows(Path(config.data), number)
            self.services[node] = self._service(node, "node", config, node)
        self.processes.update(self.services)
        self.set_pace(plan.file.federation.pace_s)
        await asyncio.gather(*(service.start() for service in self.services.values()))

    async def _attach(self, attach: "AttachPlan") -> None:
        self.observed = attach.broker
        for name, process in {SERVER: attach.server, **attach.nodes}.items():
            if process.pid is not None:
                self.processes[name] = Attached(name, process.pid)
            if process.proxy_port is not None:
                await self._listen(name, process.proxy_port)

    async def _listen(self, name: str, port: int = 0) -> None:
        """The proxy of a process."""
        broker = self.observed
        random = Random(f"{self._plan.file.seed} {name}")  # noqa: S311 - a drill that can be repeated
        tls = None if self._credentials is None else self._credentials.context()
        link = Proxy(broker.port, target_host=broker.host, port=port, random=random, tls=tls)
        try:
            self.links[name] = await self._open.enter_async_context(link)
        except OSError as error:
            where = f"attach: proxy_port {port} of {name}"
            raise ConfigError(where, f"cannot be listened on ({error.strerror})", "name another") from error

    def _service(self, name: str, role: str, config: BaseModel, link: str, *flags: str) -> Service:
        file = self.folder / f"{name}.toml"
        broker = self.links[link].config
        if self._credentials is not None:
            broker = self._credentials.way(broker, link)
        table = config.model_dump(mode="json", exclude_none=True)
        table["broker"] |= broker.model_dump(mode="json", exclude_none=True, exclude_unset=True)
        with writing(str(file), "choose another --out", MeerkatError):
            file.write_text(tomli_w.dumps(table), encoding="utf-8")
        clock = None if self._library is None else WallClock(self._library, self.folder / f"{name}.clock")
        return Service(name, role, file, self.folder / f"{name}.log", *flags, clock=clock)


def _write_rows(file: Path, number: int) -> None:
    """A toy node's data: most rows are everybody's, so that nodes agree on where to go."""
    seeds = [*range(COMMON_ROWS), *(COMMON_ROWS + OWN_ROWS * number + own for own in range(OWN_ROWS))]
    file.write_text("".join(json.dumps({"seed": seed}) + "\n" for seed in seeds), encoding="utf-8")
