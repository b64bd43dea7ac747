"""The section `[broker]`, the same for server and nodes."""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from meerkat_mq.config.section import LocalPath, Section


class BrokerConfig(Section):
    """The way to the broker.

    Attributes:
        url: mqtt://host[:port] or mqtts://host[:port], or "embedded" (server and demo only).
        ca_file: trust only this CA; default: the system's.
        cert_file: client certificate, with key_file.
        max_packet_bytes: largest MQTT packet that this broker takes.
    """

    url: str = "mqtt://127.0.0.1:1883"
    username: str | None = None
    password: str | None = None
    ca_file: LocalPath | None = None
    cert_file: LocalPath | None = None
    key_file: LocalPath | None = None
    keep_alive_s: Annotated[int, Field(ge=2, le=3600)] = 30
    max_packet_bytes: Annotated[int, Field(ge=1024, le=268_435_455)] = 131_072

    @field_validator("url")
    @classmethod
    def _known_url(cls, url: str) -> str:
        if url == "embedded":
            return url
        parts = urlsplit(url)
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or parts.path not in ("", "/"):
            raise ValueError("must be mqtt://host[:port], mqtts://host[:port] or embedded")
        _ = parts.port  # raises ValueError on a port that is no number
        return url

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.url.startswith("mqtts://")

    @property
    def host(self) -> str:
        """Host name or address."""
        return urlsplit(self.url).hostname or "127.0.0.1"

    @property
    def port(self) -> int:
        """TCP port; 1883 and 8883 by default."""
        return urlsplit(self.url).port or (8883 if self.tls else 1883)
