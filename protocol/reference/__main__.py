"""`python -m protocol.reference`: exit 0 where every golden vector holds."""

import sys
from pathlib import Path

from protocol.reference.check import check, skipped


def main(golden: Path) -> int:
    """Print what does not hold, and a count."""
    found = list(check(golden))
    wrong = [name for name, holds in found if not holds]
    for name in wrong:
        print(f"WRONG  {name}")  # noqa: T201
    print(f"{len(found) - len(wrong)} of {len(found)} golden vectors hold. {skipped()}".rstrip())  # noqa: T201
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parents[1] / "golden"))
