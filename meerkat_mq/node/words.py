"""What a node's log says last of a run, in flat lines."""

from collections.abc import Mapping
from typing import Any

from meerkat_mq.mqtt import Session
from meerkat_mq.observe.figures import log_keys
from meerkat_mq.observe.process import peak_rss_mib


def say_finished(log: Any, session: Session, counts: Mapping[str, int], *, version: int, digest: str | None) -> None:
    """The traffic of the process, a line a direction and kind of message; then how the run ended.

    Args:
        log: the node's.
        session: what it sent and received.
        counts: everything counted, by reason.
        version: of theta.
        digest: of theta, hex.
    """
    for direction, traffic in (("sent", session.sent), ("received", session.received)):
        for kind, count in traffic.items():
            log.info("traffic", direction=direction, kind=kind, **vars(count))
    log.info(
        "finished",
        version=version,
        digest=digest,
        peak_rss_mib=peak_rss_mib(),
        sent_bytes=sum(count.packet_bytes for count in session.sent.values()),
        received_bytes=sum(count.packet_bytes for count in session.received.values()),
        **log_keys(counts),
    )
