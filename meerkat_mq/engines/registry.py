"""Engines by name: those of this package, and a user's own, named "package.module:factory".

A run descriptor names the run's engine. A node never imports a module because a server names it: that would let
whoever speaks for the server run code on every node. An engine of a user's own is imported only where the process's
own TOML file names it (`check_named`).
"""

import importlib
import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.core.mask import Mask
from meerkat_mq.core.step import Engine, Row
from meerkat_mq.engines import toy
from meerkat_mq.engines.protocol import Setup
from meerkat_mq.errors import ConfigError, MeerkatError, RunMismatch, reason
from meerkat_mq.extras import Extra, importing
from meerkat_mq.tasks.data import read_rows, usable_rows
from meerkat_mq.tasks.task import Task

Factory = Callable[[Setup], Engine[Any]]

METHODS: Final = ("write", "prepare", "losses")
TRIED: Final = 2  # rows of the trial batch
SEE: Final = "see docs/engines.md"
OWN: Final = "package.module:factory"  # stands for the name of a user's own engine


@dataclass(frozen=True, slots=True)
class KnownEngine:
    """What is known of an engine before anything of it is imported.

    Attributes:
        target: "package.module:factory"; the factory takes a `Setup` and returns an engine.
        extra: what must be installed for it.
        task: whether its runs have one: those of a language model do, and its processes name a base model too.
        mask: the mask of so many weights, of an engine that needs no mask file.
        read: reads and checks the rows of a run without a task.
        public_rows: whether its rows say nothing of anybody; a node's policy does not guard them.
        completion: "package.module:function" of model and task: what the descriptor of a run of completions says of
            them; None: nothing.
        runs: whose runs it computes for, where these are another engine's: the same losses, made in another way; `OWN`:
            any user's.
    """

    target: str
    extra: Extra | None = None
    task: Literal["needed", "optional", "none"] = "optional"
    mask: Callable[[int], Mask] | None = None
    read: Callable[[Path | str], list[Row]] = read_rows
    public_rows: bool = False
    completion: str | None = None
    runs: str | None = None


ENGINES: Final = {
    "transformers": KnownEngine(
        "meerkat_mq.engines.torch.engine:make",
        extra="model",
        task="needed",
        completion="meerkat_mq.engines.torch.engine:completion",
    ),
    "onnx": KnownEngine(
        "meerkat_mq.engines.onnx.engine:make",
        extra="onnx",
        task="needed",
        runs="transformers",
        completion="meerkat_mq.engines.onnx.engine:completion",
    ),
    "graph": KnownEngine("meerkat_mq.engines.onnx.own:make", extra="onnx", runs=OWN),
    "toy": KnownEngine(
        "meerkat_mq.engines.toy:make", task="none", mask=toy.toy_mask, read=toy.read_seeds, public_rows=True
    ),
}


def entry_of(name: str) -> KnownEngine:
    """The engine of a name, or `ConfigError`; imports nothing."""
    if name in ENGINES:
        return ENGINES[name]
    if ":" in name:
        return KnownEngine(name)
    remedy = f'use {", ".join(sorted(ENGINES))}, or "{OWN}" for one of your own'
    raise ConfigError("engine", f"{name!r} is unknown", remedy)


def runs_of(name: str) -> str:
    """The engine that a run's descriptor names where this one is configured."""
    return entry_of(name).runs or name


def check_named(run: str, named: str | None) -> None:
    """Refuse, by `RunMismatch`, to compute for a run whose engine this process was not told to use.

    `run` is the engine's name in the run descriptor, `named` that in this process's own TOML file; None: any engine of
    this package.
    """
    wanted = runs_of(run if named is None else named)
    if run == named or (run in ENGINES and run == wanted) or (":" in run and wanted == OWN):
        return
    if named is None and ":" not in run:
        problem, remedy = "which this version does not have", "install the server's version of meerkat-mq here too"
    else:
        problem = "and this file names " + ("none" if named is None else f"{named!r}")
        remedy = f'if you trust that code, install it here and set engine = "{run}"'
    raise RunMismatch("engine", f"the run computes with {run!r}, {problem}", remedy)


def make_engine(name: str, setup: Setup, what: str) -> Engine[Any]:
    """Import and make an engine, and let it check that its base model is the mask's; slow.

    Args:
        name: of the engine; a name that the run's descriptor alone gives goes through `check_named` first.
        setup: what it is made for.
        what: needs it, for an error that says which extra is missing.

    Raises:
        ConfigError: an engine of a user's own cannot be imported or called, or is none.
        MissingExtra: an engine of this package needs what is not installed.
        MeerkatError: model, tokenizer or task do not fit the run.
    """
    factory = _factory(name, what)
    with _in_words(name):
        inspect.signature(factory).bind(setup)
        engine = factory(setup)
        lacking = next((method for method in METHODS if not callable(getattr(engine, method, None))), None)
        if lacking is not None:
            problem = f"{name} gives an object of type {type(engine).__name__}, without a method {lacking}"
            raise ConfigError("engine", problem, SEE)
        if check := getattr(engine, "check", None):
            check(setup.mask)
    return engine


def completion_of(name: str, model: str | None, task: Task) -> bytes | None:
    """Fingerprint of what a base model puts around the texts of a task's completions; None of other tasks.

    Only the model's tokenizer is read.

    Raises:
        ConfigError: no model is given.
        MissingExtra: the engine needs what is not installed.
        MeerkatError: the tokenizer cannot be used, or not for this task.
    """
    entry = entry_of(name)
    if entry.completion is None or task.continuation is None or not task.continuation.ends:
        return None
    if model is None:
        problem = "is missing, and nodes compare the chat template and end token of a completion with the server's"
        raise ConfigError("model", problem, "name the base model as model.source: its tokenizer alone is read")
    module, _, function = entry.completion.partition(":")
    with importing(entry.extra, "a task of completions") if entry.extra else nullcontext():
        found = getattr(importlib.import_module(module), function)
    return cast("bytes | None", found(model, task))


def own_mask(name: str, weights: int) -> Mask | None:
    """The mask that an engine brings along: of a user's own, what `mask()` of its factory returns; None without one.

    Raises:
        ConfigError: a user's own engine cannot be imported, or what it returns is no mask.
    """
    entry = entry_of(name)
    if entry.mask is not None:
        return entry.mask(weights)
    make = None if entry.task == "needed" else getattr(_factory(name, "the run's mask"), "mask", None)
    if make is None:
        return None
    with _in_words(name):
        mask = make()
    if not isinstance(mask, Mask):
        raise ConfigError("engine", f"{name}: mask() returns an object of type {type(mask).__name__}, not a Mask", SEE)
    return mask


def usable(engine: Engine[Any], rows: Sequence[Row]) -> list[Row]:
    """The rows that an engine can prepare, or `DataError` where there are none; the log names the others."""
    own = getattr(engine, "usable", None)
    return list(own(rows)) if own else usable_rows(rows, engine.prepare)


def try_out(name: str, engine: Engine[Any], theta: Float32Array, rows: Sequence[Row]) -> None:
    """Let an engine of a user's own compute the losses of two usable rows at theta, before a run depends on them.

    Raises:
        ConfigError: it fails, or what it returns is no float32 (rows,).
    """
    if name in ENGINES:
        return
    few = rows[:TRIED]
    with _in_words(name):
        engine.write(theta.copy())
        found: Any = engine.losses(engine.prepare(few))
    if not (isinstance(found, np.ndarray) and found.dtype == np.float32 and found.shape == (len(few),)):
        shown = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else f"of type {type(found).__name__}"
        problem = f"{name}: losses of {len(few)} rows are {shown}, not a NumPy array, float32 ({len(few)},)"
        raise ConfigError("engine", problem, SEE)


def _factory(name: str, what: str) -> Factory:
    entry = entry_of(name)
    module, _, attribute = entry.target.partition(":")
    with importing(entry.extra, what) if entry.extra else _in_words(name):
        found = importlib.import_module(module)
    factory = getattr(found, attribute, None)
    if not callable(factory):
        which = f"an attribute {attribute!r}, which cannot be called" if factory else f"no attribute {attribute!r}"
        raise ConfigError("engine", f"{module} has {which}", SEE)
    return cast("Factory", factory)


@contextmanager
def _in_words(name: str) -> Iterator[None]:
    """What a user's own code raises, as a `ConfigError` with the place; errors of our own tree and engines pass."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MeerkatError) or name in ENGINES:
            raise
        absent = isinstance(error, ModuleNotFoundError)
        remedy = "install it, or set PYTHONPATH to the folder that holds it" if absent else "mend it"
        problem = f"{name}: {type(error).__name__}: {reason(error)}{_place(error)}"
        raise ConfigError("engine", problem, f"{remedy}; {SEE}") from error


def _place(error: Exception) -> str:
    """The last line of a user's own code that an error passed, in brackets."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    theirs = [frame for frame in frames if Path(frame.filename) not in (Path(__file__), Path(importlib.__file__))]
    return f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
