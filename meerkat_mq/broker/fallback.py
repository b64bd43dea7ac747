"""`python -m meerkat_mq.broker.fallback PORT`: amqtt on a loopback port, for machines without Mosquitto."""

import asyncio
import sys

from amqtt.broker import Broker


async def serve(port: int) -> None:
    """Serve until killed; print "running" once it accepts."""
    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
    )
    await broker.start()
    sys.stdout.write("amqtt running\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
