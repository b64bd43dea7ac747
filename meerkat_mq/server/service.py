"""`serve`: opens the ledger, makes of it and the configuration all that a server works with, and runs it."""

import asyncio
from contextlib import suppress

from meerkat_mq.config import ServerConfig
from meerkat_mq.engines.registry import entry_of
from meerkat_mq.errors import ConfigError
from meerkat_mq.extras import need
from meerkat_mq.ledger.files import check_remains
from meerkat_mq.ledger.losses import RisingLoss, rising_from
from meerkat_mq.ledger.recovery import recovered
from meerkat_mq.ledger.run import Run, check_same
from meerkat_mq.ledger.snapshots import Snapshots
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.observe.events import Observer
from meerkat_mq.observe.process import Threads
from meerkat_mq.runtime.succession import Past
from meerkat_mq.runtime.writer import Holdings
from meerkat_mq.server.alive import alive
from meerkat_mq.server.evaluation import Evaluator
from meerkat_mq.server.monitor import Monitor
from meerkat_mq.server.patience import patiently
from meerkat_mq.server.room import check_room
from meerkat_mq.server.run import prepare_run
from meerkat_mq.server.server import Server

CLOSE_S = 1.0


async def serve(config: ServerConfig, *, replace: bool = False, observer: Observer = lambda event: None) -> None:
    """Run one server until cancelled; with `config.once`, until its run is finished.

    Where `state_dir` holds a ledger, its run goes on. Whenever the server ends, the model as it stands is in
    `state_dir/difference.mkd`.

    Args:
        config: federation.toml.
        replace: take over from a server that is online.
        observer: is told of every round and evaluation, on the event loop.

    Raises:
        MeerkatError: with what to do about it.
    """
    if config.evaluation is not None:
        if (extra := entry_of(config.engine).extra) is not None:
            need(extra, "evaluation")
        if isinstance(config.evaluation.data, str):
            need("datasets", config.evaluation.data)
    off_the_loop = asyncio.get_running_loop().run_in_executor
    try:
        await asyncio.to_thread(config.state_dir.mkdir, parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(config, error) from error
    with alive(config.state_dir) as alone, Threads(1, "ledger") as worker:
        ledger = await patiently(lambda: off_the_loop(worker, Ledger.open, config.state_dir / LEDGER_FILE))
        try:
            run = await patiently(lambda: off_the_loop(worker, _prepare, config, ledger))
            evaluator = await asyncio.to_thread(_load_evaluator, config, run)
            held, rising = await patiently(lambda: off_the_loop(worker, _recover, ledger, run))
            every = config.evaluation.every if config.evaluation else 1
            monitor = Monitor(observer, evaluator, every, run.descriptor, rising)
            await Server(config, held, worker, monitor, observer, replace=replace, alone=alone).run()
        finally:
            with suppress(TimeoutError):  # a replay may take minutes; a ledger that nobody closed is whole
                async with asyncio.timeout(CLOSE_S):
                    await off_the_loop(worker, ledger.close)


def _prepare(config: ServerConfig, ledger: Ledger) -> Run:
    begun = ledger.run
    check_remains(ledger.path, begun, ledger.version)
    run = prepare_run(config, begun)
    if begun is not None:
        check_same(run, begun, ledger.rules, str(ledger.path))
    check_room(config, run)
    return run


def _recover(ledger: Ledger, run: Run) -> tuple[Holdings, RisingLoss]:
    snapshots = Snapshots(ledger, run.descriptor)
    replica = recovered(ledger, run, snapshots)
    return Holdings(run, ledger, replica, snapshots, Past.of(ledger)), rising_from(ledger)


def _load_evaluator(config: ServerConfig, run: Run) -> Evaluator | None:
    return None if config.evaluation is None else Evaluator(config, run)


def _unusable(config: ServerConfig, error: OSError) -> ConfigError:
    """The state folder cannot be written."""
    return ConfigError(
        f"state_dir {config.state_dir}", f"cannot be used ({error.strerror})", "name a folder that can be written"
    )
