"""Attack H5 in a network of its own: `python -m tests.broker.behind_firewall FOLDER [RULES]`, under `unshare -n`.

127.0.0.9 opens sockets and says nothing; then 127.0.0.1 comes with a certificate. Prints how many of the sockets the
firewall let through, and whether the newcomer was let in.
"""

import asyncio
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tests.broker.guarded import Guarded, Raw
from tests.support.broker import HOST

SOCKETS = 60
CONNECTIONS = 40  # that the broker takes; 2,000 in what we ship


async def _attacked(guarded: Guarded) -> dict[str, object]:
    writers = []
    for _ in range(SOCKETS):
        with suppress(OSError):
            _, writer = await asyncio.open_connection(HOST, guarded.port, local_addr=("127.0.0.9", 0))
            writers.append(writer)
    newcomer = False
    with suppress(OSError):
        raw = await Raw.connected(guarded, "nodes/node-0", "x")
        newcomer = await raw.lives()
        raw.drop()
    for writer in writers:
        writer.transport.abort()
    return {"sockets": len(writers), "newcomer": newcomer}


def main(folder: Path, rules: str) -> None:
    """With these rules of nftables, for port 8883."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    guarded = Guarded(folder)
    if rules:
        subprocess.run(["nft", "-f", "-"], input=rules.replace("8883", str(guarded.port)), text=True, check=True)
    guarded.broker.start()
    try:
        guarded.replace("max_connections 2000", f"max_connections {CONNECTIONS}")
        print(json.dumps(asyncio.run(_attacked(guarded))))  # noqa: T201
    finally:
        guarded.broker.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]), "".join(sys.argv[2:]))
