"""A certificate that does not fit for a while."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import ClassVar, Literal

from meerkat_mq.broker.certs import CA, CERTIFICATE
from meerkat_mq.chaos.faults.fault import Fault, Place
from meerkat_mq.chaos.stage import Stage


class CertificateSwapped(Fault):
    """Open connections are reset, and new ones fail in the TLS handshake or before it.

    Attributes:
        which: "broker": another server answers with its own certificate, as behind a captive portal; "client": the
            service's certificate is another one than its key's, as in the middle of a renewal; "ca": the CA's file is
            not there.
    """

    name: ClassVar[str] = "certificate-swapped"
    on: ClassVar[Place] = "link"
    attachable: ClassVar[bool] = False
    secured: ClassVar[bool] = True

    which: Literal["broker", "client", "ca"] = "broker"

    @asynccontextmanager
    async def strike(self, stage: Stage, target: str, random: Random) -> AsyncIterator[None]:
        """Swap it, put it back."""
        credentials, link = stage.credentials, stage.links[target]
        assert link.tls is not None
        own = credentials.of(target)
        file = own / (CA if self.which == "ca" else CERTIFICATE)
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
