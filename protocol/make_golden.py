"""Write `protocol/golden/` anew: `python -m protocol.make_golden`. Only a new protocol version changes a vector."""

import hashlib
from pathlib import Path

from protocol import vectors_core, vectors_node, vectors_wire
from protocol.vectors_core import to_json

GOLDEN = Path(__file__).parent / "golden"


def build() -> dict[str, bytes]:
    """All golden files by name."""
    files = {**vectors_core.FILES, **vectors_wire.FILES, **vectors_node.FILES}
    made = {name: make() for name, (_, make) in files.items()}
    listed = [
        {"file": name, "what": files[name][0], "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in made.items()
    ]
    return {**made, "manifest.json": to_json({"protocol": 1, "files": listed})}


def main() -> None:
    """Write the files."""
    for name, data in build().items():
        (GOLDEN / name).write_bytes(data)
        print(f"{len(data):7d}  {name}")  # noqa: T201


if __name__ == "__main__":
    main()
