"""The TLS settings of a broker connection; what is wrong with our own certificate, as far as its holder can see."""

import os
import ssl
from datetime import UTC, datetime
from typing import Any

from meerkat_mq.config import BrokerConfig
from meerkat_mq.errors import ConfigError

# TLS 1.2: a fresh key for each connection, and encryption that authenticates; no CBC, whose padding has told secrets.
# TLS 1.3 has no other suites. `broker/` offers the same.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


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
    """TLS 1.2 or newer with `CIPHERS`, host name and certificate checked. Reads files: call it off the event loop.

    Raises:
        ConfigError: a file is missing, is no certificate or key, or the key is not the certificate's.
    """
    context = Context(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
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


def certificate_flaws(broker: BrokerConfig, name: str | None) -> tuple[str, ...]:
    """Why a broker may not take our client certificate, or takes us for somebody else. Blocks: reads a file.

    `name` is the user that the federation's rights are given to: a node's id; None where nobody knows.
    """
    file = broker.cert_file
    if file is None:
        return ()
    from cryptography import x509  # noqa: PLC0415 - not everybody has a certificate
    from cryptography.x509.oid import ExtendedKeyUsageOID as Usage  # noqa: PLC0415
    from cryptography.x509.oid import NameOID  # noqa: PLC0415

    try:
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError):  # the TLS library says that better
        return ()
    names, now = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME), datetime.now(UTC)
    holder = str(names[0].value) if names else ""
    try:
        usages = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except (x509.ExtensionNotFound, ValueError):
        usages = {Usage.CLIENT_AUTH}
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    flaws = {
        f"{file} is the certificate of {holder!r}, and this is {name!r}": name not in (None, holder),
        f"{file} has expired on {ends:%Y-%m-%d}": ends < now,
        f"{file} is valid from {begins:%Y-%m-%d} on, by the clock here": begins > now,
        f"{file} is a certificate for brokers, not for clients": usages.isdisjoint(
            {Usage.CLIENT_AUTH, Usage.ANY_EXTENDED_KEY_USAGE}
        ),
    }
    return tuple(flaw for flaw, holds in flaws.items() if holds)


def user_flaws(broker: BrokerConfig, name: str | None) -> tuple[str, ...]:
    """Why a broker with rights by user name may take us for somebody else."""
    is_other = name is not None and broker.username not in (None, name)
    return (f"broker.username is {broker.username!r}, and this is {name!r}",) if is_other else ()
