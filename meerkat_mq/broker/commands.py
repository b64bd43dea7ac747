"""`meerkat certs`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from meerkat_mq.errors import ConfigError


def certs(
    folder: Annotated[Path, typer.Argument(help="Folder of the federation's CA and all that it signs.")],
    federation: Annotated[str | None, typer.Option(help="Make the server's certificate, and Mosquitto's ACL.")] = None,
    broker: Annotated[
        list[str] | None, typer.Option(help="Make the broker's certificate, for this name or address; again for more.")
    ] = None,
    node: Annotated[
        list[str] | None, typer.Option(help="Make a node's certificate, for this id; again for more.")
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=36_500, help="Validity of certificates.")] = 397,
    ca_days: Annotated[int, typer.Option(min=1, max=36_500, help="Validity of a new CA.")] = 3650,
    renew: Annotated[bool, typer.Option("--renew", help="Replace these certificates; the CA stays.")] = False,
) -> None:
    """Make certificates for a broker with TLS, the server and nodes; the first time, their CA too."""
    from meerkat_mq.broker.certs import write_certificates  # noqa: PLC0415 - slow to import

    if not (federation or broker or node):
        raise ConfigError("command line", "asks for no certificate", "add --federation, --broker or --node")
    for made in write_certificates(
        folder,
        federation=federation,
        hosts=broker or (),
        nodes=node or (),
        days=days,
        ca_days=ca_days,
        renew=renew,
    ):
        Console().print(f"{made.folder}: valid until {made.until:%Y-%m-%d}", highlight=False, soft_wrap=True)
