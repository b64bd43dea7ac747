"""What an update costs the server's machine, by the number of nodes that it knows and that are offline.

    python -m benchmarks.offline_nodes                    2,000 nodes online; 0, 100 and 20,000 offline

CPU time of one thread an update of one open round, its commit included, and the ratio to that with nobody offline.
"""

import argparse
import time

from meerkat_mq.rounds import events as e
from meerkat_mq.rounds.policy import RoundSettings
from meerkat_mq.rounds.server import ServerMachine
from meerkat_mq.wire.descriptor import NodeStatus
from meerkat_mq.wire.frames import Header, Update

RUN, MASK, BASE = bytes(16), bytes(range(16)), bytes(range(16))


def status(word: str) -> NodeStatus:
    return NodeStatus.model_validate({"status": word, "boot": 1, "link": 1, "host": "there"})


def machine(online: int, offline: int) -> ServerMachine:
    """With an open round of `online` nodes."""
    slots = {f"n{slot}": slot for slot in range(online + offline)}
    settings = RoundSettings(
        run_id=RUN, mask_hash=MASK, count=10, local_steps=1, directions=1, lr=1e-6, eps=1e-3,
        min_nodes=online, min_updates=1, fraction=1.0, quorum=1.0, deadline_s=60, grace_s=2,
    )  # fmt: skip
    server = ServerMachine(settings, term=1, server_id="0" * 16, base=BASE, slots=slots)
    server.start(0.0)
    for slot in range(online, online + offline):
        server.handle(e.StatusCame(0.0, f"n{slot}", status("online")))
        server.handle(e.StatusCame(0.0, f"n{slot}", status("lost")))
    for slot in range(online):
        server.handle(e.StatusCame(9.0, f"n{slot}", status("online")))
    return server


def seconds_an_update(online: int, offline: int) -> float:
    server = machine(online, offline)
    update = Update(Header.of(RUN, 1, 0, MASK), 1, BASE[:8], 0.5, (1.0,))
    began = time.thread_time()
    for slot in range(online - 1):  # the last would close the round
        for effect in server.handle(e.UpdateCame(10.0, f"n{slot}", update)):
            assert isinstance(effect, e.CommitUpdate)
            server.handle(e.UpdatesCommitted(10.0, (effect.record,)))
            assert server.wake_at is not None
    return (time.thread_time() - began) / (online - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--online", type=int, default=2000)
    parser.add_argument("--offline", type=int, nargs="+", default=[0, 100, 20_000])
    args = parser.parse_args()
    spent = {offline: seconds_an_update(args.online, offline) for offline in args.offline}
    print("| offline | µs an update | ratio |")
    for offline, seconds in spent.items():
        print(f"| {offline:,} | {1e6 * seconds:.1f} | {seconds / spent[args.offline[0]]:.2f} |")


if __name__ == "__main__":
    main()
