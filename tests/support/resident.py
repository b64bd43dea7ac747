"""Memory of processes."""

import os
from pathlib import Path


def resident_mib(pid: int | None = None) -> float:
    """MiB of memory of a process, of this one by default."""
    status = Path(f"/proc/{pid or os.getpid()}/status").read_text(encoding="utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024
