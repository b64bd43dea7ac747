"""`meerkat`: the command line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from meerkat_mq import __version__
from meerkat_mq.errors import without_credentials
from meerkat_mq.observe.process import run_process

_COMMANDS = {
    "demo": "demo.command:command",
    "doctor": "demo.doctor:command",
    "init": "demo.begin:command",
    "mask": "engines.commands:mask",
    "partition": "tasks.commands:partition",
    "certs": "broker.commands:certs",
    "certs renew": "broker.commands:renew",
    "certs revoke": "broker.commands:revoke",
    "bundle": "engines.onnx.command:bundle",
    "export": "server.export:export",
    "server": "server.__main__:command",
    "node": "node.__main__:command",
    "broker": "broker.__main__:command",
    "simulate": "simulate.command:command",
    "chaos": "chaos.command:command",
    "sweep": "sweep.command:command",
    "status": "server.commands:status",
    "ledger": "server.commands:ledger",
    "verify": "server.commands:verify",
    "report": "server.commands:report",
}


_UsageError: Any = typer.BadParameter.__base__  # of click, wherever this typer has it


@contextmanager
def _discreet() -> Iterator[None]:
    """An argument in the wrong place is quoted in the error: a URL without its password."""
    try:
        yield
    except _UsageError as error:
        error.message = without_credentials(error.message)
        raise


class _Commands(TyperGroup):
    """Commands of one word, or of two."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """As the base does."""
        with _discreet():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """As the base does."""
        with _discreet():
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """A name of two words comes before a command of one word with an argument."""
        two = " ".join(args[:2])
        return (two, self.commands[two], args[2:]) if two in self.commands else super().resolve_command(ctx, args)


def _version(wanted: bool) -> None:
    if wanted:
        Console().print(f"meerkat-mq {__version__}", highlight=False)
        raise typer.Exit


def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


def command_line(word: str = "") -> typer.Typer:
    """All commands, or those alone that begin with this word: to import the others takes longer than a node's start."""
    app = typer.Typer(
        name="meerkat",
        cls=_Commands,
        callback=_options,
        help="Fine-tune language models across unreliable devices over plain MQTT.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name in [name for name in _COMMANDS if name.split()[0] == word] or _COMMANDS:
        module, function = _COMMANDS[name].split(":")
        app.command(name)(getattr(import_module(f"meerkat_mq.{module}"), function))
    return app


def main() -> None:
    """The command line: errors become one line on stderr and their exit code."""
    run_process(command_line(*sys.argv[1:2]))
