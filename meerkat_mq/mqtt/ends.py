"""How a connection fails or ends, and what that means in words."""

from typing import NamedTuple

from meerkat_mq.config import BrokerConfig
from meerkat_mq.errors import BadCredentials, BrokerError, MeerkatError

_BAD_CLIENT_ID, _BAD_USER, _NOT_AUTHORISED = 133, 134, 135
_CLOCK = ("expired", "not yet valid")  # a clock that is set, or a renewed certificate, mends that


class Sending(NamedTuple):
    """A message that may have to do with the end of a connection; its size is that of the whole packet."""

    topic: str
    size: int
    retain: bool

    def __str__(self) -> str:
        return f"{self.topic} ({self.size} bytes)"


class Lost(Exception):
    """The connection failed or ended; the next one may work."""

    sending: tuple[
        Sending, ...
    ] = ()  # what was on its way, the oldest first; or else what was acknowledged just before
    closed = False  # it ended from the other side, not because an answer was missing
    unanswered = False  # that was before the answer to CONNECT


class Refused(Lost):
    """The broker refuses us, we refuse the broker, or a file is missing: wrong settings, or a fault that passes.

    `error` says so to people, with a remedy.
    """

    def __init__(self, error: MeerkatError) -> None:
        super().__init__(str(error))
        self.error = error


class Words:
    """Makes errors of what the broker, the TLS library and the system say."""

    def __init__(self, broker: BrokerConfig, client_id: str) -> None:
        self.flaws: tuple[str, ...] = ()  # what is wrong with our own certificate, as far as this process can see
        self._broker = broker
        self._client_id = client_id

    def refusal(self, code: int, answer: str) -> Lost:
        """What a negative CONNACK means; `code` is MQTT 5's."""
        where = self._broker.address
        if code in (_BAD_USER, _NOT_AUTHORISED):
            remedy = "check broker.username and broker.password, and whether the broker allows this client id"
            return Refused(BadCredentials(where, f"refuses {self._user} ({answer}){self._but}", remedy))
        if code == _BAD_CLIENT_ID:
            problem = f"refuses the client id {self._client_id!r}, or a keep-alive of {self._broker.keep_alive_s} s"
            remedy = "lower broker.keep_alive_s (Mosquitto: max_keepalive), or choose an id that the broker allows"
            return Refused(BrokerError(where, f"{problem} ({answer})", remedy))
        return Lost(f"refuses the connection ({answer})")

    def subscription(self, topic: str) -> Refused:
        """What a negative SUBACK means."""
        problem = f"{self._broker.address} refuses the subscription{self._but}"
        return Refused(BrokerError(topic, problem, f"allow it to {self._user} in the broker's ACL"))

    def failure(self, text: str) -> Lost:
        """What the end of a connection means, told by the words of paho, ssl and the system."""
        if "ALERT" in text and ("CERTIFICATE" in text or "UNKNOWN_CA" in text):
            return Refused(self._bad_certificate(text))
        if "CERTIFICATE_VERIFY_FAILED" in text and any(words in text for words in _CLOCK):
            return Lost(f"the broker's certificate is out of date, or the clock here is wrong ({text})")
        if "CERTIFICATE_VERIFY_FAILED" in text:
            trusted = self._broker.ca_file or "the system's CAs"
            remedy = "set broker.ca_file to the CA that signed it, broker.url to a name that it holds"
            problem = f"its certificate does not verify against {trusted} ({text})"
            return Refused(BrokerError(self._broker.address, problem, remedy))
        if "HANDSHAKE_FAILURE" in text or "UNSUPPORTED_PROTOCOL" in text or "PROTOCOL_VERSION" in text:
            remedy = "let it offer TLS 1.2 or newer, with ECDHE and AES-GCM or ChaCha20 (docs/secure-a-federation.md)"
            problem = f"it and this client have no TLS version and cipher suite in common ({text})"
            return Refused(BrokerError(self._broker.address, problem, remedy))
        return Lost(text)

    def _bad_certificate(self, text: str) -> BadCredentials:
        where, file = self._broker.address, self._broker.cert_file
        if "CERTIFICATE_EXPIRED" in text:
            remedy = "make a new one with meerkat certs renew, and put it in its place"
            return BadCredentials(where, f"refuses the client certificate {file}: it has expired", remedy)
        if "CERTIFICATE_REVOKED" in text:
            remedy = "make a new one with meerkat certs renew FOLDER ID, and put it in its place"
            return BadCredentials(where, f"refuses the client certificate {file}: it was revoked", remedy)
        remedy = "set broker.cert_file, broker.key_file to a certificate of the broker's CA that has not expired"
        return BadCredentials(where, f"refuses the client certificate ({text}){self._but}", remedy)

    @property
    def _but(self) -> str:
        return "".join(f"; {flaw}" for flaw in self.flaws)

    @property
    def _user(self) -> str:
        if self._broker.username is not None:
            return f"user {self._broker.username!r}"
        if self._broker.cert_file:
            return f"the holder of {self._broker.cert_file}"
        return f"client {self._client_id!r} without a user name"
