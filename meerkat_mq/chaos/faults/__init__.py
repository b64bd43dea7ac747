"""Faults, one a file; `FAULTS` is what plans can name (docs/faults.md says how to write one)."""

from meerkat_mq.chaos.faults.auth_refused import AuthRefused
from meerkat_mq.chaos.faults.bandwidth import Bandwidth
from meerkat_mq.chaos.faults.broker_kill import BrokerKill
from meerkat_mq.chaos.faults.broker_stop import BrokerStop
from meerkat_mq.chaos.faults.certificate_swapped import CertificateSwapped
from meerkat_mq.chaos.faults.clock_step import ClockStep
from meerkat_mq.chaos.faults.clone import Clone
from meerkat_mq.chaos.faults.corrupt import Corrupt
from meerkat_mq.chaos.faults.cut import Cut
from meerkat_mq.chaos.faults.disk_full import DiskFull
from meerkat_mq.chaos.faults.drop import Drop
from meerkat_mq.chaos.faults.duplicate import Duplicate
from meerkat_mq.chaos.faults.fault import Fault
from meerkat_mq.chaos.faults.freeze import Freeze
from meerkat_mq.chaos.faults.host_power_cut import HostPowerCut
from meerkat_mq.chaos.faults.latency import Latency
from meerkat_mq.chaos.faults.log_full import LogFull
from meerkat_mq.chaos.faults.poison import Poison
from meerkat_mq.chaos.faults.refuse import Refuse
from meerkat_mq.chaos.faults.reorder import Reorder
from meerkat_mq.chaos.faults.reset import Reset
from meerkat_mq.chaos.faults.second_server import SecondServer
from meerkat_mq.chaos.faults.sigkill import Sigkill
from meerkat_mq.chaos.faults.sigstop import Sigstop

__all__ = ["FAULTS", "Fault"]

FAULTS: dict[str, type[Fault]] = {
    fault.name: fault
    for fault in (
        Sigkill,
        Sigstop,
        BrokerStop,
        BrokerKill,
        Latency,
        Bandwidth,
        Refuse,
        Reset,
        Freeze,
        Cut,
        Duplicate,
        Reorder,
        Drop,
        Corrupt,
        Clone,
        SecondServer,
        Poison,
        LogFull,
        HostPowerCut,
        DiskFull,
        ClockStep,
        CertificateSwapped,
        AuthRefused,
    )
}
