"""A real NATS server, with the configuration that we ship, for one test."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.broker import HOST, Broker, free_port, program

SHIPPED = Path(__file__).parents[2] / "broker/nats"


class Nats(Broker):
    """nats-server with a configuration of ours, in which only the given words are replaced.

    As our Mosquitto, it remembers nothing when it starts again.
    """

    SIGN = "Server is ready"
    wills_at_takeover = False

    def __init__(
        self, folder: Path, shipped: str = "nats-server.conf", listens: str = f"{HOST}:1883", **replace: str
    ) -> None:
        super().__init__(folder)
        self._store = folder / f"nats-{self.port}"
        self._conf = folder / f"nats-{self.port}.conf"
        self._text = (SHIPPED / shipped).read_text(encoding="utf-8")
        words = {
            f"{HOST}:4222": f"{HOST}:{free_port()}",
            listens: f"{HOST}:{self.port}",
            "/var/lib/nats/meerkat": str(self._store),
        }
        for old, new in (words | replace).items():
            assert old in self._text
            self._text = self._text.replace(old, new)

    def prepare(self) -> tuple[Sequence[str], Mapping[str, str] | None]:
        shutil.rmtree(self._store, ignore_errors=True)
        self._conf.write_text(self._text)
        return [program("nats-server", makes_sure="make test-brokers"), "-c", str(self._conf)], None

    def replace(self, old: str, new: str) -> None:
        """Put other words into the configuration file, for a reload."""
        assert old in self._text
        self._text = self._text.replace(old, new)
        self._conf.write_text(self._text)
