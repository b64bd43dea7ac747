"""Make the core's golden vectors here and hold them against the committed ones: `python -m protocol.check_core`.

Needs NumPy only, so that it runs on any device that nodes run on.
"""

import platform
import sys
from pathlib import Path

import numpy as np

from meerkat_mq.core.mask import Mask
from protocol.vectors_core import FILES


def check(golden: Path) -> dict[str, bool]:
    """Whether each committed file is what this machine makes, and whether the mask file decodes to itself."""
    found = {name: (golden / name).read_bytes() == make() for name, (_, make) in FILES.items()}
    data = (golden / "mask.bin").read_bytes()
    return {**found, "mask.bin decoded and encoded": Mask.from_bytes(data).to_bytes() == data}


def main(golden: Path) -> int:
    """Print each result; 1 where one differs."""
    found = check(golden)
    for name, same in found.items():
        print(f"{'same' if same else 'WRONG'}  {name}")  # noqa: T201
    print(f"Python {platform.python_version()}, NumPy {np.__version__}, {platform.machine()}")  # noqa: T201
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent / "golden"))
