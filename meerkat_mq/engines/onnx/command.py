"""`meerkat bundle`: torch and onnx are imported only where a bundle is made."""

import hashlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from meerkat_mq.config import ModelConfig, check_config
from meerkat_mq.core.mask import Mask
from meerkat_mq.engines.onnx.quantise import Weights
from meerkat_mq.errors import ConfigError, printable_lines
from meerkat_mq.extras import importing


def bundle(
    model: Annotated[str, typer.Option(help="Base model of the run: local folder or hub id.")],
    weights: Annotated[Weights, typer.Option(help="How linear weights and embeddings are stored.")] = "int8",
    mask: Annotated[Path | None, typer.Option(help="Mask file of the run; with --out.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the bundle; must not exist yet, or be empty.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a LoRA adapter that the base model is merged with.")
    ] = None,
    as_base: Annotated[
        Path | None,
        typer.Option(help="Write instead the model that such weights give back, to be the base of a run: a folder."),
    ] = None,
) -> None:
    """Write what a node without PyTorch needs; or a base model that such nodes hold exactly."""
    with (
        importing("model", "meerkat bundle"),
        importing("onnx", "meerkat bundle"),
        importing("bundle", "meerkat bundle"),
    ):
        from meerkat_mq.engines.onnx.bundle import make_bundle, publish_base  # noqa: PLC0415
        from meerkat_mq.engines.onnx.manifest import MANIFEST  # noqa: PLC0415
        from meerkat_mq.engines.torch.merge import base_folder  # noqa: PLC0415

    check_config({"source": model}, ModelConfig, where="command line")
    if (out is None) == (as_base is None):
        raise ConfigError(
            "--out", "and --as-base: give one of them", "--as-base comes first, then its mask, then --out"
        )
    if (mask is None) == (out is not None):
        found = "is missing" if mask is None else "is read with --out only"
        raise ConfigError("--mask", found, "give the run's mask with --out; a base needs none")
    base = base_folder(model, adapter)
    if as_base is not None:
        publish_base(base, weights, as_base)
        _say(f"{as_base}: the base of a run whose nodes hold {weights} weights; make the mask on it")
    if out is not None and mask is not None:
        make_bundle(base, Mask.load(mask), weights, out, _say)
        size = sum(file.stat().st_size for file in out.iterdir())
        sha256 = hashlib.sha256((out / MANIFEST).read_bytes()).hexdigest()
        _say(f"{out}: {weights} weights, {size / 1e6:,.0f} MB; SHA-256 of {MANIFEST}: {sha256}")


def _say(text: str) -> None:
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print(printable_lines(text))
