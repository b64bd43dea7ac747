"""Faults of the link between a process and the broker, as a whole."""

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Annotated, Literal

from pydantic import Field

from meerkat_mq.broker.certs import CA, CERTIFICATE
from meerkat_mq.chaos.faults.fault import Fault
from meerkat_mq.chaos.stage import Stage


class Latency(Fault):
    """Packets take longer, each way.

    Attributes:
        latency_s: every packet.
        jitter_s: up to so much more, drawn for each packet; their order stays, as on every TCP connection.
    """

    name = "latency"
    on = "link"

    latency_s: Annotated[float, Field(ge=0, le=60)] = 0.2
    jitter_s: Annotated[float, Field(ge=0, le=60)] = 0.2

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        link = stage.links[target]
        before = link.latency_s, link.jitter_s
        link.latency_s, link.jitter_s = before[0] + self.latency_s, before[1] + self.jitter_s
        try:
            yield
        finally:
            link.latency_s, link.jitter_s = before


class Bandwidth(Fault):
    """So many bytes a second, each way: of MQTT, without TCP and IP."""

    name = "bandwidth"
    on = "link"

    bytes_per_s: Annotated[float, Field(ge=1)] = 4000.0

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        link = stage.links[target]
        link.bytes_per_s = self.bytes_per_s
        try:
            yield
        finally:
            link.bytes_per_s = math.inf


class Refuse(Fault):
    """Connections are reset, new ones too."""

    name = "refuse"
    on = "link"

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        link = stage.links[target]
        link.refuse = True
        link.reset()
        try:
            yield
        finally:
            link.refuse = False


class Reset(Fault):
    """RST to both sides of what is open, once; new connections get through."""

    name = "reset"
    on = "link"

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        stage.links[target].reset()
        yield


class Freeze(Fault):
    """Connections stay, nothing goes through; what waits goes through when it heals.

    Attributes:
        way: "up" to the broker, "down" from it, or "both".
    """

    name = "freeze"
    on = "link"

    way: Literal["up", "down", "both"] = "both"

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        link = stage.links[target]
        link.freeze(up=self.way != "down", down=self.way != "up")
        try:
            yield
        finally:
            link.thaw()


class CertificateSwapped(Fault):
    """Open connections are reset, and new ones fail in the TLS handshake or before it.

    Attributes:
        which: "broker": another server answers with its own certificate, as behind a captive portal; "client": the
            service's certificate is another one than its key's, as in the middle of a renewal; "ca": the CA's file is
            not there.
    """

    name = "certificate-swapped"
    on = "link"
    attachable = False
    secured = True

    which: Literal["broker", "client", "ca"] = "broker"

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        credentials, link = stage.credentials, stage.links[target]
        assert link.tls is not None
        file = credentials.of(target) / (CA if self.which == "ca" else CERTIFICATE)
        right = file.read_bytes()
        if self.which == "broker":
            credentials.show(link.tls, strangers=True)
        elif self.which == "client":
            file.write_bytes((credentials.strangers / CERTIFICATE).read_bytes())
        else:
            file.unlink()
        link.reset()
        try:
            yield
        finally:
            credentials.show(link.tls)
            file.write_bytes(right)
