"""`python -m meerkat_mq.server --config federation.toml`, the same as `meerkat server`."""

from meerkat_mq.observe.start import start

if __name__ == "__main__":
    start()  # before anything that takes long to import

import sys
from pathlib import Path
from typing import Annotated

import typer

from meerkat_mq.broker.embedded import embedded_broker
from meerkat_mq.config import ServerConfig, load_config
from meerkat_mq.observe.logs import JsonLogs, LeastLevel, configure_logs
from meerkat_mq.observe.process import run_process, run_service
from meerkat_mq.server.service import serve


def command(
    config: Annotated[Path, typer.Option(help="The federation's TOML file.")],
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Take over from a server that is online, or from a run that is not finished."),
    ] = False,
    once: Annotated[bool, typer.Option("--once", help="End with the run; exit code 6 if too few nodes come.")] = False,
    json_logs: JsonLogs = None,
    log_level: LeastLevel = "INFO",
) -> None:
    """Run the server until SIGTERM, or, with --once, until its run is finished."""
    configure_logs(as_json=json_logs, level=log_level)
    sys.exit(run_service(lambda: _serve(config, replace=replace, once=once), config=config))


async def _serve(path: Path, *, replace: bool, once: bool) -> None:
    config = load_config(path, ServerConfig)
    config = config.model_copy(update={"once": config.once or once})
    if config.broker.url != "embedded":
        return await serve(config, replace=replace)
    async with embedded_broker(config.broker) as broker:
        return await serve(config.model_copy(update={"broker": broker.config}), replace=replace)


if __name__ == "__main__":
    run_process(lambda: typer.run(command))
