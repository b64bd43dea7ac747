"""Faults, by what they strike; `FAULTS` is what plans can name (docs/faults.md says how to write one)."""

from meerkat_mq.chaos.faults import broker, link, packets, process
from meerkat_mq.chaos.faults.fault import Fault

__all__ = ["FAULTS", "Fault"]

_KINDS: tuple[type[Fault], ...] = (
    *(process.Sigkill, process.Sigstop, process.HostPowerCut, process.DiskFull, process.LogFull, process.ClockStep),
    *(process.Clone, process.SecondServer),
    *(broker.BrokerStop, broker.BrokerKill, broker.AuthRefused),
    *(link.Latency, link.Bandwidth, link.Refuse, link.Reset, link.Freeze, link.CertificateSwapped),
    *(packets.Cut, packets.Duplicate, packets.Reorder, packets.Drop, packets.Corrupt, packets.Poison),
)
FAULTS = {kind.name: kind for kind in _KINDS}
