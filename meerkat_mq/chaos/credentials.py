"""Passwords and certificates of a drill whose faults strike these.

Each service connects with TLS and a certificate of its own to its proxy, which ends the encryption, so that all other
faults still see MQTT packets; to Mosquitto it is known by user name and password.
"""

import base64
import hashlib
import secrets
import ssl
from collections.abc import Iterable
from pathlib import Path

from meerkat_mq.broker.certs import CA, CERTIFICATE, KEY, write_certificates
from meerkat_mq.config import BrokerConfig
from meerkat_mq.core.files import write_atomically

HOST = "127.0.0.1"
_USER = "drill"
_HASH_ROUNDS = 101  # Mosquitto's own number


class Credentials:
    """All of them, in a folder.

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
