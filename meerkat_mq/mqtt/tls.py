"""The TLS settings of a broker connection."""

import os
import ssl
from typing import Any

from meerkat_mq.config import BrokerConfig
from meerkat_mq.errors import ConfigError


class Context(ssl.SSLContext):
    """A client context that remembers its last socket: paho leaks it when the handshake fails."""

    last_socket: ssl.SSLSocket | None = None

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        """As in the standard library."""
        self.last_socket = super().wrap_socket(*args, **kwargs)
        return self.last_socket

    def drop_socket(self) -> None:
        """Close the last socket."""
        if self.last_socket is not None:
            self.last_socket.close()
            self.last_socket = None


def client_context(broker: BrokerConfig) -> Context:
    """TLS 1.2 or newer, host name and certificate checked. Reads files: call it off the event loop.

    Raises:
        ConfigError: a file is missing, is no certificate or key, or the key is not the certificate's.
    """
    context = Context(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        if broker.ca_file is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(broker.ca_file)
    except OSError as error:
        problem = f"{broker.ca_file}: {_words(error)}"
        raise ConfigError("broker.ca_file", problem, _remedy(error, "give a CA file in PEM format")) from error
    if broker.cert_file is not None:
        try:
            context.load_cert_chain(broker.cert_file, broker.key_file, password="")  # else OpenSSL asks on the terminal
        except OSError as error:
            files = ", ".join(str(file) for file in (broker.cert_file, broker.key_file) if file is not None)
            problem = f"{files}: {_words(error)}"
            remedy = _remedy(error, "give a certificate and its key in PEM format, without a passphrase")
            raise ConfigError("broker.cert_file", problem, remedy) from error
    return context


def _remedy(error: OSError, otherwise: str) -> str:
    """A key is its owner's alone: in a container or a unit, that is often another user."""
    return f"make it readable to the user {os.geteuid()}" if isinstance(error, PermissionError) else otherwise


def _words(error: OSError) -> str:
    return error.strerror or str(error)
