"""`meerkat certs`, `meerkat certs revoke` and `meerkat certs renew`."""

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from meerkat_mq.errors import ConfigError, printable


def certs(
    folder: Annotated[Path, typer.Argument(help="Folder of the federation's CA and all that it signs.")],
    federation: Annotated[
        str | None, typer.Option(help="Make the certificates of server and observer, and the ACL.")
    ] = None,
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
        said = printable(f"{made.folder}: valid until {made.until:%Y-%m-%d}")
        Console().print(said, highlight=False, markup=False, soft_wrap=True)


def revoke(
    folder: Annotated[Path, typer.Argument(help="Folder of the federation's CA and all that it signed.")],
    names: Annotated[list[str], typer.Argument(metavar="ID...", help="Node ids; or meerkat.server, meerkat.observer.")],
) -> None:
    """Revoke all certificates that a node was given, and say how the broker learns of it."""
    from meerkat_mq.broker.certs import revoke_certificates  # noqa: PLC0415 - slow to import

    say = partial(Console().print, highlight=False, markup=False, soft_wrap=True)
    for name, number in revoke_certificates(folder, names).items():
        say(f"{name}: certificates revoked: {number}" if number else f"{name}: was revoked before")
    say(f"Now copy {folder}/broker/crl.pem to the broker, beside its cert.pem, and restart it (not only reload it):")
    say("    systemctl restart mosquitto")
    say("Until then, who is connected stays connected. The restart also clears what they left retained, unless the")
    say("broker has persistence (docs/secure-a-federation.md).")


def renew(
    folder: Annotated[Path, typer.Argument(help="Folder of the federation's CA and all that it signed.")],
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[ID...]", help="These alone, whenever they expire.")
    ] = None,
    *,
    within: Annotated[int, typer.Option(min=0, max=36_500, help="Days in which a certificate expires.")] = 30,
    days: Annotated[int, typer.Option(min=1, max=36_500, help="Validity of the new ones.")] = 397,
) -> None:
    """Make new certificates, with new keys, where they expire soon: of broker, server, observer and nodes."""
    from meerkat_mq.broker.renewal import Kept, renew_certificates  # noqa: PLC0415 - slow to import

    say = partial(Console().print, highlight=False, markup=False, soft_wrap=True)
    outcomes = list[Kept | Path]()
    for made in renew_certificates(folder, names or (), within=timedelta(days=within), days=days):
        outcomes.append(made if isinstance(made, Kept) else made.folder)
        say(f"{made.folder}: {made.why}" if isinstance(made, Kept) else f"{made.folder}: valid until {made.until:%F}")
    if not outcomes:
        say(f"{folder}: nothing expires within {within} days")
    if any(isinstance(outcome, Path) for outcome in outcomes):
        say("Now copy each of these folders to its machine. The old certificates stay valid to their end, and services")
        say("read the new ones at their next connection. A broker reads its own when it reloads:")
        say("    systemctl reload mosquitto")
