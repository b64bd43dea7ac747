"""`meerkat mask` and `doctor --model`: torch is imported only where a model is used."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from meerkat_mq.config import Dtype, ModelConfig, check_config
from meerkat_mq.engines.protocol import Method
from meerkat_mq.errors import ConfigError, ModelError, printable_lines, shown
from meerkat_mq.extras import importing, need
from meerkat_mq.tasks.commands import writing


def _print(text: str, *, to_stderr: bool = False) -> None:
    console = Console(stderr=to_stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print(printable_lines(text))


def _note(text: str) -> None:
    _print(f"note: {text}", to_stderr=True)


def mask(
    model: Annotated[str, typer.Option(help="Base model: local folder or hub id.")],
    text: Annotated[
        str, typer.Option(help="Calibration text: plain, or rows with a field text, as partition takes them.")
    ],
    out: Annotated[Path, typer.Option(help="Mask file to write.")],
    method: Annotated[
        Method, typer.Option(help="How weights are scored; or all of them, or an adapter.")
    ] = "sensitivity",
    density: Annotated[
        float | None,
        typer.Option(
            help="Share u of each linear matrix that is trained, 0 < u ≤ 1; not of dense and lora.",
            show_default="0.001",
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the adapter, with --method lora.", show_default="8")] = None,
    from_layer: Annotated[
        str | None,
        typer.Option(
            help="Mask nothing below this block: its number, from 0, or a share of the blocks, such as 0.5.",
            show_default="masks all",
        ),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a LoRA adapter that the base model is merged with.")
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences of calibration text.")] = 100,
    length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Order of the text, and the random mask.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:<i>.")] = "cpu",
    dtype: Annotated[
        Dtype, typer.Option(help="Of the model while it is scored; it must hold the checkpoint exactly.")
    ] = "float32",
) -> None:
    """Score the weights of a model and write a mask."""
    with importing("model", "meerkat mask"):  # torch only where a model is used
        from meerkat_mq.engines.torch.load import load_model  # noqa: PLC0415
        from meerkat_mq.engines.torch.masks import make_mask  # noqa: PLC0415
        from meerkat_mq.engines.torch.merge import base_folder  # noqa: PLC0415
        from meerkat_mq.tasks.data import read_texts  # noqa: PLC0415
        from meerkat_mq.tasks.sources import named_source  # noqa: PLC0415

    _check_options(method, density, rank, out)
    first = None if from_layer is None else _layer(from_layer)
    check_config({"source": model, "device": device}, ModelConfig, where="command line")
    texts = read_texts(named_source(text))
    base = base_folder(model, adapter, lambda made: _note(f"model and adapter are merged in {made}"))
    loaded = load_model(base, dtype=dtype, device=device)
    for note in loaded.notes:
        _note(note)
    columns = TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("scoring")
        made = make_mask(
            loaded,
            texts,
            method,
            density=1e-3 if density is None else density,
            rank=8 if rank is None else rank,
            from_layer=first,
            seed=seed,
            sequences=sequences,
            length=length,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            say=_note,
        )
    replaced = ", in place of the file that was there" if out.exists() else ""
    with writing(out):
        made.save(out)
    weights = f"{made.size:,} of {made.covered:,} weights in {len(made.matrices)} matrices"
    _print(f"{out}: {weights}, hash {made.hash.hex()}{replaced}")


def _check_options(method: Method, density: float | None, rank: int | None, out: Path) -> None:
    for option, unused in (
        ("--density", density is not None and method in ("dense", "lora")),
        ("--rank", rank is not None and method != "lora"),
    ):
        if unused:
            raise ConfigError(option, f"means nothing to --method {method}", "leave it out")
    if method == "lora":
        need("lora", "--method lora")
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out {out}", "is not a file in a folder that exists", "make the folder, name the file")


def _layer(text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        remedy = "give a block's number, or a share of the blocks, such as 0.5"
        raise ConfigError("--from-layer", f"{shown(text)} is no number", remedy) from None


def doctor(model: str, task: str | None, dtype: Dtype, device: str, as_json: bool) -> None:
    """Look at a model before it is used, and say what is wrong with it; exit code 4 if anything is."""
    with importing("model", "meerkat doctor"):
        from meerkat_mq.engines.torch.inspect import Finding, inspect_model  # noqa: PLC0415
        from meerkat_mq.tasks.load import load_task  # noqa: PLC0415

    check_config({"source": model, "device": device}, ModelConfig, where="command line")

    def show(found: Finding) -> None:
        if as_json:
            print(json.dumps(asdict(found)), flush=True)  # noqa: T201 - no terminal's width must break it
            return
        sign = {True: "✓", False: "✗", None: "–"}[found.good]
        _print(f"{sign} {found.step}: {found.text}" + (f"; {found.remedy}" if found.remedy else ""))

    if not inspect_model(model, dtype=dtype, device=device, task=load_task(task) if task else None, show=show):
        raise typer.Exit(ModelError.exit_code)
