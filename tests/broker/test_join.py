"""`broker/mosquitto-join.conf` on a Mosquitto that has a configuration and users of its own."""

import getpass
import re
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from meerkat_mq.config import BrokerConfig
from tests.broker.guarded import BROKERS, NODES, Guarded, Raw, node, publish
from tests.server.federation import TOPICS, Federation, all_end
from tests.support.broker import HOST, free_port, program
from tests.support.mosquitto import Mosquitto
from tests.support.peer import peer
from tests.support.waiting import until

pytestmark = [pytest.mark.not_on(nats="Mosquitto's own files"), pytest.mark.not_on(rabbitmq="Mosquitto's own files")]

OWN = """\
per_listener_settings true
pid_file {folder}/mosquitto.pid
persistence true
persistence_location {folder}/
autosave_on_changes true
autosave_interval 1
log_dest stderr
user {user}
listener {plain} 127.0.0.1
{security}
include_dir {folder}/conf.d
"""
WITH_PASSWORDS = "allow_anonymous false\npassword_file {folder}/passwords\nacl_file {folder}/acl"
ANONYMOUS = "allow_anonymous true\nacl_file {folder}/acl"
ACLS = {WITH_PASSWORDS: "user panel\ntopic readwrite home/#\n", ANONYMOUS: "topic readwrite #\ntopic deny meerkat/#\n"}


class Existing(Mosquitto):
    """A broker as somebody runs it already: one plain listener, its own users, persistence."""

    def __init__(self, folder: Path, security: str, own: str = OWN) -> None:
        super().__init__(folder)
        self.plain = self.port
        self._security, self._own = security, own
        (folder / "conf.d").mkdir()
        (folder / "acl").write_text(ACLS[security])
        passwords = [program("mosquitto_passwd", makes_sure="make test"), "-c", "-b", str(folder / "passwords")]
        subprocess.run([*passwords, "panel", "right"], check=True, capture_output=True)

    def prepare(self) -> tuple[Sequence[str], Mapping[str, str] | None]:
        words = {"folder": self.folder, "plain": self.plain, "user": getpass.getuser()}
        return self.run_with(self._own.format(security=self._security.format(folder=self.folder), **words)), None

    @property
    def way(self) -> BrokerConfig:
        """Of its own user, over the plain listener."""
        login = {} if self._security == ANONYMOUS else {"username": "panel", "password": "right"}
        return BrokerConfig(url=f"mqtt://{HOST}:{self.plain}", **login)  # type: ignore[arg-type]

    def join(self, certificates: Path) -> int:
        """Put our file beside its own, as the guide says; the port of the new listener."""
        self.port = free_port()
        text = (BROKERS / "mosquitto-join.conf").read_text(encoding="utf-8")
        for old, new in {
            "listener 8883": f"listener {self.port} {HOST}",
            "/etc/mosquitto/meerkat": str(certificates),
        }.items():
            assert old in text
            text = text.replace(old, new)
        (self.folder / "conf.d/meerkat.conf").write_text(text)
        return self.port


class Joined(Guarded):
    """A federation's listener on a broker of others."""

    def __init__(self, folder: Path, existing: Existing) -> None:
        super().__init__(folder)
        self.broker = self.existing = existing
        self.port = existing.join(self.certificates / "broker")


@pytest.fixture(params=[WITH_PASSWORDS, ANONYMOUS], ids=["passwords", "anonymous"])
async def existing(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Existing]:
    """It runs, and keeps something of its own user's."""
    broker = Existing(tmp_path, request.param)
    try:
        broker.start()
        async with peer(broker.way, "panel") as panel:
            await panel.session.publish("home/lamp", b"on", retain=True)
        yield broker
    finally:
        broker.kill()


@pytest.fixture
def joined(existing: Existing, tmp_path: Path) -> Iterator[Joined]:
    existing.stop()
    before = {path: path.read_bytes() for path in (tmp_path / "acl", tmp_path / "passwords")}
    made = Joined(tmp_path, existing)
    made.broker.start()
    yield made
    assert {path: path.read_bytes() for path in before} == before


async def test_a_federation_joins_and_the_others_keep_what_they_have(joined: Joined, tmp_path: Path) -> None:
    async with Federation(tmp_path / "federation", joined.way("observer")) as federation:
        nodes = [federation.node(n, exit_when_finished=True, broker=joined.table(f"nodes/{n}")) for n in NODES]
        server = federation.server("--once", rounds={"count": 3, "min_nodes": 2}, broker=joined.table("server"))
        assert await all_end(server, *nodes) == [0, 0, 0]
    async with peer(joined.existing.way, "panel", [("home/#", 1)]) as panel:
        await until(lambda: panel.payloads == [b"on"])  # from before
        await panel.session.publish("home/lamp", b"off")
        await until(lambda: panel.payloads == [b"on", b"off"])


async def test_neither_side_reaches_the_other(joined: Joined) -> None:
    """Nor does a user of the plain listener take the server's name or client id."""
    status, root = TOPICS.up(NODES[0], "status"), f"{TOPICS.root}/#"
    async with (
        peer(joined.way("observer"), "eye", [(root, 1)]) as eye,
        peer(joined.existing.way, "panel", [("#", 1), (root, 1), ("home/#", 1)]) as panel,
        node(joined, 0, "#", "home/#") as a,
    ):
        for topic in (TOPICS.server, TOPICS.run, status):
            with suppress(ConnectionError):
                panel.session.publish(topic, b"forged", retain=True)
        await until(lambda: panel.up)
        raw = await Raw.connected(joined, f"nodes/{NODES[1]}", "x")
        raw.send(publish("home/lamp", b"forged", 1, retain=True))
        raw.drop()
        await a.session.publish(status, b"mine")
        await until(lambda: b"mine" in eye.payloads)
        async with peer(joined.existing.way, "other", [("home/#", 1)]) as other:
            await other.session.publish("home/end", b"end")
            await until(lambda: b"end" in panel.payloads and b"end" in other.payloads)
        assert eye.payloads == [b"mine"]
        assert {message.topic for message in [*panel.messages, *other.messages]} == {"home/lamp", "home/end"}
        assert b"forged" not in [*panel.payloads, *other.payloads]
        assert {message.topic for message in a.messages} == {status}


async def test_a_user_of_the_others_is_nobody_here(joined: Joined) -> None:
    """Their names give no rights on the federation's topics, whatever they call themselves."""
    way = joined.existing.way.model_copy(update={"username": "meerkat.server", "password": "x"})
    async with peer(joined.way("observer"), "eye", [(f"{TOPICS.root}/#", 1)]) as eye:
        with suppress(Exception):
            async with peer(way, f"meerkat-{NODES[0]}") as thief:
                thief.session.publish(TOPICS.server, b"forged", retain=True)
        async with node(joined, 0) as a:
            await a.session.publish(TOPICS.up(NODES[0], "status"), b"mine")
            await until(lambda: b"mine" in eye.payloads)
        assert eye.payloads == [b"mine"]


@pytest.mark.parametrize("existing", [WITH_PASSWORDS], ids=["passwords"], indirect=True)
async def test_without_settings_by_listener_mosquitto_does_not_start_and_says_why(
    existing: Existing, tmp_path: Path
) -> None:
    """Else our ACL would be everybody's."""
    existing.kill()
    existing._own = OWN.replace("per_listener_settings true\n", "")
    Joined(tmp_path, existing)
    with pytest.raises(AssertionError):
        existing.start()
    assert re.search(r"Duplicate acl_file value in configuration", existing.log)


async def test_the_guide_names_the_file_and_what_it_needs() -> None:
    guide = (BROKERS.parent / "docs/secure-a-federation.md").read_text(encoding="utf-8")
    for words in ("mosquitto-join.conf", "per_listener_settings true", "topic deny meerkat/#"):
        assert words in guide
    shipped = (BROKERS / "mosquitto-tls.conf").read_text(encoding="utf-8").splitlines()
    joined = (BROKERS / "mosquitto-join.conf").read_text(encoding="utf-8").splitlines()
    lines = [line for line in joined if line and not line.startswith("#")]
    assert set(lines) <= set(shipped)
