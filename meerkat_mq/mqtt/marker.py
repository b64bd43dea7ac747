"""A small file that says: this client has been connected to this broker before."""

import json
from pathlib import Path

from meerkat_mq.config import BrokerConfig
from meerkat_mq.core.files import write_atomically

MARKER_FILE = "connected"


class Marker:
    """Outlives the process: a restart in the middle of a passing fault is no first start.

    It is of one client and one broker: where that is, and whether with TLS. Both methods block, and raise OSError where
    the file cannot be read or written.
    """

    def __init__(self, folder: Path, broker: BrokerConfig, client: str) -> None:
        self.file = folder / MARKER_FILE
        url = f"{'mqtts' if broker.tls else 'mqtt'}://{broker.address}"
        self._line = json.dumps({"broker": url, "client": client}).encode() + b"\n"

    def is_there(self) -> bool:
        """Whether this client has been connected to this broker."""
        try:
            return self.file.read_bytes() == self._line
        except FileNotFoundError:
            return False

    def leave(self) -> None:
        """Write it."""
        write_atomically(self.file, self._line)
