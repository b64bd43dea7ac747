"""`python -m meerkat_mq.broker [--port N]`: a broker on 127.0.0.1, in the foreground, until SIGTERM or SIGINT."""

import argparse
import asyncio
import signal
import sys

from meerkat_mq.broker.embedded import embedded_broker
from meerkat_mq.errors import MeerkatError


async def serve(port: int) -> None:
    """Run until told to stop.

    Raises:
        BrokerError: the broker did not start, or ended by itself.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with embedded_broker(port=port) as broker:
        told, ended = asyncio.create_task(stop.wait()), asyncio.create_task(broker.watch())
        await asyncio.wait({told, ended}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            told.cancel()
            await ended
        ended.cancel()


def main() -> int:
    """Parse the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m meerkat_mq.broker", description=__doc__)
    parser.add_argument("--port", type=int, default=1883, help="0 chooses a free one (default: %(default)s)")
    try:
        asyncio.run(serve(parser.parse_args().port))
    except MeerkatError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
