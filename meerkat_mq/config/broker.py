"""The section `[broker]`, the same for server and nodes."""

import re
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, StringConstraints, ValidationInfo, field_validator

from meerkat_mq.config.section import LocalPath, Section, in_vain

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<place>[^/?#]*)(?P<rest>.*)", re.DOTALL)
_PLACE = re.compile(r"(?P<host>\[[^\[\]]*\]|[^\[\]:%\\]+)(:(?P<port>[^:]*))?")
CHUNK_PACKET_BYTES = 2**16 + 1024  # a chunk of 64 KiB, its header, its topic
_PORTS = {"mqtt": 1883, "mqtts": 8883}
_SHAPE = "must be mqtt://host[:port], mqtts://host[:port] or embedded"
_CREDENTIALS = "must hold no user and password: put them into broker.username and broker.password"

_NEEDS = {
    "password": ("username", "is not sent without a user name"),
    "key_file": ("cert_file", "does nothing without its certificate"),
}

_Text = Annotated[str, StringConstraints(max_length=16_000)]  # MQTT: 65,535 bytes of UTF-8


class _Address(NamedTuple):
    tls: bool
    host: str
    port: int


class BrokerConfig(Section):
    """The way to the broker."""

    url: str = "mqtt://127.0.0.1:1883"
    username: Annotated[_Text, StringConstraints(min_length=1)] | None = None
    password: _Text | None = Field(default=None, repr=False)
    ca_file: LocalPath | None = None
    cert_file: LocalPath | None = None
    key_file: LocalPath | None = None
    keep_alive_s: Annotated[int, Field(ge=2, le=3600)] = 30
    max_packet_bytes: Annotated[int, Field(ge=1024, le=268_435_455)] = 131_072
    give_up: Literal["first-start", "never", "always"] = "first-start"

    @field_validator("url")
    @classmethod
    def _known_url(cls, url: str) -> str:
        if url != "embedded":
            _parse(url)
        return url

    @field_validator("username", "ca_file", "cert_file", "key_file")
    @classmethod
    def _of_use_with_this_url(cls, value: str | Path | None, info: ValidationInfo) -> str | Path | None:
        url = info.data.get("url")
        if value is None or url is None:
            return value
        if url == "embedded":
            raise in_vain('does nothing with url = "embedded": remove it')
        if info.field_name != "username" and not _parse(url).tls:
            raise in_vain("does nothing without TLS: write mqtts:// in broker.url, or remove it")
        return value

    @field_validator("password", "key_file")
    @classmethod
    def _of_use_with_another_key(cls, value: str | Path | None, info: ValidationInfo) -> str | Path | None:
        needs, problem = _NEEDS[str(info.field_name)]
        if value is not None and info.data.get(needs, "") is None:
            raise in_vain(f"{problem}: add broker.{needs}")
        return value

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self._address.tls

    @property
    def host(self) -> str:
        """Host name or address."""
        return self._address.host

    @property
    def port(self) -> int:
        """TCP port; 1883 and 8883 by default."""
        return self._address.port

    @property
    def address(self) -> str:
        """Host and port, for people."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def shows_password(self) -> bool:
        """Whether everybody between us and the broker can read the password."""
        return self.password is not None and not self.tls and not _is_this_machine(self.host)

    @property
    def _address(self) -> _Address:
        return _Address(False, "127.0.0.1", _PORTS["mqtt"]) if self.url == "embedded" else _parse(self.url)


def room_for_chunks(broker: BrokerConfig, why: str) -> None:
    """ValueError where the broker takes no packet that holds a chunk."""
    if broker.max_packet_bytes < CHUNK_PACKET_BYTES:
        raise ValueError(f"broker.max_packet_bytes must be {CHUNK_PACKET_BYTES} or more with {why}")


def _parse(url: str) -> _Address:
    """The parts of a URL; ValueError, in words that hold none of it, where one is wrong or would be ignored."""
    if "@" in url or "%40" in url:
        raise ValueError(_CREDENTIALS)
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        raise ValueError("must hold no white space")
    parts = _URL.fullmatch(url)
    if parts is None or (scheme := parts["scheme"].lower()) not in _PORTS:
        raise ValueError(_SHAPE)
    if parts["rest"] not in ("", "/"):
        raise ValueError(f"{_SHAPE}: what comes after that would do nothing")
    place = _PLACE.fullmatch(parts["place"])
    if place is None:
        raise ValueError(f"{_SHAPE}; an IPv6 address in brackets: mqtt://[::1]:1883")
    port = place["port"]
    if port is not None and not (re.fullmatch(r"[0-9]{1,5}", port) and 1 <= int(port) <= 65535):
        raise ValueError("the port must be a number from 1 to 65535")
    return _Address(scheme == "mqtts", _host(place["host"]), _PORTS[scheme] if port is None else int(port))


def _host(text: str) -> str:
    if not text.startswith("["):
        return text.lower()
    try:
        return str(IPv6Address(text[1:-1]))
    except ValueError:
        raise ValueError("holds brackets, and no IPv6 address in them") from None


def _is_this_machine(host: str) -> bool:
    """Whether a host name or address is one of the loopback interface."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
