"""A real RabbitMQ, with the configuration that we ship: one for all tests, a virtual host for each."""

import base64
import http.client
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from tests.support.broker import HOST, STOP_S, Broker, free_port, program

SHIPPED = Path(__file__).parents[2] / "broker/rabbitmq"
SCRIPT = "/usr/lib/rabbitmq/bin/rabbitmq-server"  # past the wrapper, which becomes the user rabbitmq
README = SHIPPED.parent / "README.md"
_LOGIN = "Basic " + base64.b64encode(b"guest:guest").decode()


def _shipped(name: str, words: Mapping[str, str]) -> str:
    """A configuration of ours, in which only these words are replaced."""
    text = (SHIPPED / name).read_text(encoding="utf-8")
    for old, new in words.items():
        assert old in text
        text = text.replace(old, new)
    return text


class RabbitMQ(Broker):
    """rabbitmq-server and its port mapper, which is ours alone; as our Mosquitto, a start forgets everything."""

    SIGN = "Server startup complete"
    wills_at_takeover = False
    START_S = 60.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._http, self._dist, self._names = free_port(), free_port(), free_port()
        self._hosts = count()
        self._host = self._next_host()
        self._mapper: subprocess.Popen[bytes] | None = None

    def prepare(self) -> tuple[Sequence[str], Mapping[str, str] | None]:
        program("rabbitmq-server", makes_sure="make test-brokers")
        home = self.folder / f"rabbitmq-{self.port}"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        text = self.settings()
        text += f"management.tcp.ip = {HOST}\nmanagement.tcp.port = {self._http}\nloopback_users.guest = true\n"
        (home / "rabbitmq.conf").write_text(text)
        plugins = (SHIPPED / "enabled_plugins").read_text(encoding="utf-8")
        (home / "enabled_plugins").write_text(plugins.replace("]", ",rabbitmq_management]"))
        environment = {
            **os.environ,
            "HOME": str(home),
            "ERL_EPMD_PORT": str(self._names),
            "RABBITMQ_NODENAME": f"meerkat-{self.port}@localhost",
            "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
            "RABBITMQ_LOG_BASE": str(home / "log"),
            "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "enabled_plugins"),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_PID_FILE": str(home / "pid"),
            "RABBITMQ_DIST_PORT": str(self._dist),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none -kernel inet_dist_use_interface {127,0,0,1}",
        }
        self._map_names()
        return [SCRIPT], environment

    def settings(self) -> str:
        """What we ship, in a virtual host of its own from the first connection on."""
        text = _shipped("rabbitmq.conf", {f"{HOST}:1883": f"{HOST}:{self.port}"})
        return text + f"default_vhost = {self._host}\nmqtt.vhost = {self._host}\n"

    def fresh(self) -> "RabbitMQ":
        """Empty, for the next test, which may find it killed or frozen."""
        if self._process is None or self._process.poll() is not None:
            self.start()
            return self
        self.thaw()
        self._ask("DELETE", f"vhosts/{self._host}")
        self._use(self._next_host())
        return self

    @property
    def pid(self) -> int:
        return int((self.folder / f"rabbitmq-{self.port}/pid").read_text())

    def kill(self) -> None:
        """Its script waits for Erlang, which is what has to go."""
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._process.wait(STOP_S)

    def stop(self) -> None:
        self.kill()

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """With the last test."""
        self.kill()
        self._end_mapper()

    def _end_mapper(self) -> None:
        if self._mapper is not None:
            self._mapper.kill()
            self._mapper.wait(STOP_S)
            self._mapper = None

    def _map_names(self) -> None:
        if self._mapper is None:
            command = [program("epmd", makes_sure="make test-brokers"), "-address", HOST, "-port", str(self._names)]
            self._mapper = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def _next_host(self) -> str:
        return f"test-{next(self._hosts)}"

    def _use(self, host: str) -> None:
        """Connections to our port now go to this virtual host."""
        self._host = host
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        self._ask("PUT", f"vhosts/{host}")
        self._ask("PUT", f"permissions/{host}/guest", everything)
        mapping = {"name": "mqtt_port_to_vhost_mapping", "value": {str(self.port): host}}
        self._ask("PUT", "global-parameters/mqtt_port_to_vhost_mapping", mapping)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> None:
        deadline = time.monotonic() + self.START_S
        while True:
            link = http.client.HTTPConnection(HOST, self._http, timeout=10)
            try:
                headers = {"Authorization": _LOGIN, "Content-Type": "application/json"}
                link.request(method, f"/api/{path}", json.dumps(body or {}), headers)
                status = link.getresponse().status
                assert status < 300 or time.monotonic() < deadline, (method, path, status)
                if status < 300:
                    return
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
            finally:
                link.close()
            time.sleep(0.05)


class HardenedRabbitMQ(RabbitMQ):
    """RabbitMQ with what we ship for a network, and the users that broker/README.md makes."""

    def __init__(self, folder: Path, certificates: Path, federation: str, nodes: Sequence[str]) -> None:
        super().__init__(folder)
        self._certificates, self._federation, self._nodes = certificates, federation, nodes

    def settings(self) -> str:
        words = {
            "mqtt.listeners.ssl.default = 8883": f"mqtt.listeners.ssl.1 = {HOST}:{self.port}",
            "/etc/rabbitmq/meerkat": str(self._certificates),
        }
        return _shipped("rabbitmq-tls.conf", words)

    def start(self) -> "HardenedRabbitMQ":
        super().start()
        for call in _calls(self._federation, self._nodes):
            self._carry_out(*call)
        return self

    def kill(self) -> None:
        """With its port mapper: it is of one test."""
        super().kill()
        self._end_mapper()

    def delete_user(self, name: str) -> None:
        self._carry_out("delete_user", name)

    def _carry_out(self, command: str, *words: str) -> None:
        """What rabbitmqctl would: a process of that takes a second, and the management plugin is there."""
        match command, *words:
            case "delete_user", user:
                if user != "guest":  # whose password the management plugin needs
                    self._ask("DELETE", f"users/{user}")
            case "add_user", user, _:
                self._ask("PUT", f"users/{user}", {"password": "unused", "tags": ""})
            case "clear_password", user:
                self._ask("PUT", f"users/{user}", {"password_hash": "", "tags": ""})
            case "set_permissions", user, configure, write, read:
                rights = {"configure": configure, "write": write, "read": read}
                self._ask("PUT", f"permissions/%2F/{user}", rights)
            case "set_topic_permissions", user, exchange, write, read:
                rights = {"exchange": exchange, "write": write, "read": read}
                self._ask("PUT", f"topic-permissions/%2F/{user}", rights)
            case "set_user_limits", user, limits:
                for name, value in json.loads(limits).items():
                    self._ask("PUT", f"user-limits/{user}/{name}", {"value": value})
            case "set_policy", name, pattern, definition, "--apply-to", kind:
                policy = {"pattern": pattern, "definition": json.loads(definition), "apply-to": kind}
                self._ask("PUT", f"policies/%2F/{name}", policy)
            case _:
                raise AssertionError((command, *words))


def _calls(federation: str, nodes: Sequence[str]) -> list[list[str]]:
    """The calls of rabbitmqctl in broker/README.md, for each node."""
    section = README.read_text(encoding="utf-8").split("\n## Rights on RabbitMQ\n")[1].split("\n## ")[0]
    block = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
    assert "gateway-07" in block
    script = "rabbitmqctl() { printf '%s\\0' \"$@\"; echo; }\n"
    for user in nodes:
        script += block.replace("gateway-07", user).replace(".field\\.", f".{federation}\\.") + "\n"
    said = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True).stdout
    return [line.split("\0")[:-1] for line in said.splitlines()]
