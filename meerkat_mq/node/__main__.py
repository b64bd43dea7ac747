"""`python -m meerkat_mq.node --config node.toml`, the same as `meerkat node`."""

from meerkat_mq.observe.start import start

if __name__ == "__main__":
    start()  # before anything that takes long to import

import sys
from pathlib import Path
from typing import Annotated

import typer

from meerkat_mq.config import NodeConfig, load_config
from meerkat_mq.node.service import run_node
from meerkat_mq.observe.logs import JsonLogs, LeastLevel, configure_logs
from meerkat_mq.observe.process import run_process, run_service


def command(
    config: Annotated[Path, typer.Option(help="The node's TOML file.")],
    json_logs: JsonLogs = None,
    log_level: LeastLevel = "INFO",
) -> None:
    """Run a node until SIGTERM, or until its run is finished where exit_when_finished is set."""
    configure_logs(as_json=json_logs, level=log_level)
    sys.exit(run_service(lambda: run_node(load_config(config, NodeConfig)), config=config))


if __name__ == "__main__":
    run_process(lambda: typer.run(command))
