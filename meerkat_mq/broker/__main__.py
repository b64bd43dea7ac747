"""`python -m meerkat_mq.broker`: a broker on 127.0.0.1, in the foreground, until SIGTERM or SIGINT."""

from meerkat_mq.observe.start import start

if __name__ == "__main__":
    start()  # before anything that takes long to import

import sys
from typing import Annotated

import typer

from meerkat_mq.broker.embedded import embedded_broker
from meerkat_mq.observe.logs import JsonLogs, LeastLevel, configure_logs
from meerkat_mq.observe.process import run_process, run_service


def command(
    port: Annotated[int, typer.Option(help="TCP port on 127.0.0.1; 0 chooses a free one.")] = 1883,
    json_logs: JsonLogs = None,
    log_level: LeastLevel = "INFO",
) -> None:
    """Run a broker on 127.0.0.1: Mosquitto where it is installed, else amqtt."""
    configure_logs(as_json=json_logs, level=log_level)
    sys.exit(run_service(lambda: _serve(port)))


async def _serve(port: int) -> None:
    async with embedded_broker(port=port) as broker:
        await broker.watch()


if __name__ == "__main__":
    run_process(lambda: typer.run(command))
