"""What it takes a node to join a run over a slow link, and how often each byte of the mask goes over it.

    python -m benchmarks.slow_link                        2, 8 and 20 kB/s; 5 minutes
    python -m benchmarks.slow_link --links 4000:300000    bytes a second : weights of the mask

Real server, node and Mosquitto processes, a proxy that brings so many bytes a second each way, and the toy engine's
mask. "least" is the mask's bytes ÷ the link's. Then the node does 20 rounds alone. Prints a Markdown table.
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

from tests.server.federation import Federation
from tests.support.mosquitto import Mosquitto
from tests.support.proxy import Proxy

ROUNDS = {"count": 20, "quorum": 1.0, "deadline_s": 600.0}
PATIENCE_S = 3600.0


async def join(bytes_per_s: float, weights: int, folder: Path) -> str:
    broker = Mosquitto(folder).start()
    try:
        async with Federation(folder, broker.config) as federation, Proxy(broker.port) as proxy:
            await federation.server(rounds=ROUNDS, toy_weights=weights).says("in charge")
            proxy.bytes_per_s = bytes_per_s
            began = time.monotonic()
            node = federation.node("node-0", exit_when_finished=True, broker={"url": proxy.config.url})
            await node.says("ready", within_s=PATIENCE_S)
            ready_s = time.monotonic() - began
            await node.says("finished", within_s=PATIENCE_S)
            rounds_s = time.monotonic() - began - ready_s
            size, lost = federation.eye.runs[-1].mask_bytes, len(node.said("connection lost"))
    finally:
        broker.kill()
    received = {line["kind"]: line for line in node.said("traffic", direction="received")}
    came = sum(received[kind]["payload_bytes"] for kind in ("blob", "down"))
    return (
        f"| {bytes_per_s / 1000:g} kB/s | {size:,} | {size / bytes_per_s:.0f} s | {ready_s:.0f} s | "
        f"{came / size:.2f} | {lost} | {rounds_s:.0f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", nargs="+", default=["2000:40000", "8000:300000", "20000:300000"])
    args = parser.parse_args()
    print("| link | bytes of the mask | least | joined after | received ÷ mask | connections lost | 20 rounds |")
    print("|---|---|---|---|---|---|---|")
    for link in args.links:
        bytes_per_s, weights = link.split(":")
        with tempfile.TemporaryDirectory() as folder:
            print(asyncio.run(join(float(bytes_per_s), int(weights), Path(folder))), flush=True)


if __name__ == "__main__":
    main()
