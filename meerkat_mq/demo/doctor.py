"""`meerkat doctor`: looks at a model, or at the way to the broker that a configuration names, before it is used."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from meerkat_mq.config import BrokerConfig, Dtype, NodeConfig, ServerConfig, load_config
from meerkat_mq.config.load import read_toml
from meerkat_mq.engines.commands import doctor as look_at_model
from meerkat_mq.errors import BrokerError, ConfigError
from meerkat_mq.mqtt.expiry import expiries
from meerkat_mq.mqtt.tls import certificate_flaws, client_context, user_flaws
from meerkat_mq.observe.tables import say
from meerkat_mq.wire.topics import SERVER_NAME

OTHERS = 0o077  # the permissions of group and others


@dataclass(frozen=True, slots=True)
class Looked:
    """What one look at the way to the broker found; `good` as in the look at a model."""

    step: str
    good: bool
    text: str
    remedy: str = ""


def command(
    *,
    model: Annotated[str | None, typer.Option(help="Model to look at: local folder or hub id.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="federation.toml or node.toml: look at its way to the broker.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Also look at this task: built in, or its TOML file.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the model.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:<i>.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines instead of words.")] = False,
) -> None:
    """Look at a model, or at certificates and passwords, and say what is wrong; exit code 4 or 5 if anything is."""
    if model is None and config is None:
        raise ConfigError("command line", "names nothing to look at", "add --model or --config")
    looked = [] if config is None else list(_look(config))
    for one in looked:
        _show(one, as_json=as_json)
    if model is not None:
        look_at_model(model, task, dtype, device, as_json)
    if not all(one.good for one in looked):
        raise typer.Exit(BrokerError.exit_code)


def _show(one: Looked, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(one)), flush=True)  # noqa: T201 - no terminal's width must break it
        return
    say(Console(), f"{'✓' if one.good else '✗'} {one.step}: {one.text}" + (f"; {one.remedy}" if one.remedy else ""))


def _look(path: Path) -> Iterator[Looked]:
    """Everything that can be seen without a connection."""
    if "id" in read_toml(path):
        node = load_config(path, NodeConfig)
        broker, name = node.broker, node.id
    else:
        broker, name = load_config(path, ServerConfig).broker, SERVER_NAME
    yield Looked("configuration", True, f"{path} is valid")
    yield from _look_at_broker(broker, name)
    if broker.tls:
        yield from _look_at_files(broker, name)


def _look_at_broker(broker: BrokerConfig, name: str) -> Iterator[Looked]:
    yield Looked("broker", True, f"{broker.address}, {'with' if broker.tls else 'without'} TLS")
    if broker.shows_password:
        problem = f"everybody between this machine and {broker.address} can read it"
        yield Looked("password", False, problem, "write mqtts:// in broker.url, and see docs/secure-a-federation.md")
    for flaw in user_flaws(broker, name):
        yield Looked("user name", False, flaw, "a broker with rights by user name takes it for that one")


def _look_at_files(broker: BrokerConfig, name: str) -> Iterator[Looked]:
    try:
        client_context(broker)
    except ConfigError as error:
        yield Looked("TLS files", False, f"{error.where}: {error.problem}", error.remedy)
        return
    for flaw in certificate_flaws(broker, name):
        yield Looked("certificate", False, flaw, "put the right one in its place")
    key = broker.key_file or broker.cert_file
    if key is not None and (mode := key.stat().st_mode & 0o777) & OTHERS:
        yield Looked("key", False, f"{key} can be read by others (mode {mode:04o})", f"chmod 600 {key}")
    for expiry in expiries(broker):
        good = f"the {expiry.what} {expiry.place} is valid until {expiry.until:%Y-%m-%d}"
        yield Looked("validity", not (words := expiry.warning()), words or good)
