"""A real Mosquitto for one test."""

import getpass
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.broker import HOST, Broker, free_port, program

__all__ = ["HOST", "Mosquitto", "ShippedMosquitto", "free_port"]


class Mosquitto(Broker):
    """Mosquitto with `lines` added to its configuration."""

    SIGN = " running"

    def __init__(self, folder: Path, *lines: str, anonymous: bool = True) -> None:
        super().__init__(folder)
        self._lines = [
            f"listener {self.port} {HOST}",
            f"allow_anonymous {str(anonymous).lower()}",
            f"user {getpass.getuser()}",
            "set_tcp_nodelay true",
            "max_queued_messages 0",
            "log_dest stderr",
            "log_type all",
            *lines,
        ]

    def prepare(self) -> tuple[Sequence[str], Mapping[str, str] | None]:
        return self.run_with("\n".join([*self._lines, ""])), None

    def run_with(self, text: str) -> list[str]:
        conf = self.folder / f"mosquitto-{self.port}.conf"
        conf.write_text(text)
        return [program("mosquitto", makes_sure="make test"), "-c", str(conf)]


class ShippedMosquitto(Mosquitto):
    """Mosquitto with a configuration file of ours, in which only the given words are replaced."""

    SIGN = ""

    def __init__(self, folder: Path, shipped: Path, replace: Mapping[str, str]) -> None:
        super().__init__(folder)
        self._text = shipped.read_text(encoding="utf-8")
        for old, new in replace.items():
            self.replace(old, new.format(port=self.port, host=HOST, user=getpass.getuser()))

    def replace(self, old: str, new: str) -> None:
        """Put other words into the configuration, for the next start."""
        assert old in self._text
        self._text = self._text.replace(old, new)

    def prepare(self) -> tuple[Sequence[str], Mapping[str, str] | None]:
        return self.run_with(self._text), None
