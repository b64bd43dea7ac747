"""`meerkat`: the command line."""

from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from meerkat_mq import __version__
from meerkat_mq.broker.__main__ import command as broker
from meerkat_mq.broker.commands import certs, revoke
from meerkat_mq.chaos.command import command as chaos
from meerkat_mq.demo.begin import command as init
from meerkat_mq.demo.command import command as demo
from meerkat_mq.engines.commands import doctor, export, mask
from meerkat_mq.node.__main__ import command as node
from meerkat_mq.observe.process import run_process
from meerkat_mq.server.__main__ import command as server
from meerkat_mq.server.commands import ledger, report, status, verify
from meerkat_mq.simulate.command import command as simulate
from meerkat_mq.sweep.command import command as sweep
from meerkat_mq.tasks.commands import partition


class _Commands(TyperGroup):
    """Commands of one word, or of two."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """A name of two words comes before a command of one word with an argument."""
        two = " ".join(args[:2])
        return (two, self.commands[two], args[2:]) if two in self.commands else super().resolve_command(ctx, args)


app = typer.Typer(
    name="meerkat",
    cls=_Commands,
    help="Fine-tune language models across unreliable devices over plain MQTT.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo)
app.command("doctor")(doctor)
app.command("init")(init)
app.command("mask")(mask)
app.command("partition")(partition)
app.command("certs")(certs)
app.command("certs revoke")(revoke)
app.command("export")(export)
app.command("server")(server)
app.command("node")(node)
app.command("broker")(broker)
app.command("simulate")(simulate)
app.command("chaos")(chaos)
app.command("sweep")(sweep)
app.command("status")(status)
app.command("ledger")(ledger)
app.command("verify")(verify)
app.command("report")(report)


def _version(wanted: bool) -> None:
    if wanted:
        Console().print(f"meerkat-mq {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


def main() -> None:
    """The command line: errors become one line on stderr and their exit code."""
    run_process(app)
