"""Extras: packages that only some commands need. Every import of them goes through the one guard here."""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from meerkat_mq.errors import MissingExtra

Extra = Literal["model", "onnx", "bundle", "lora", "datasets", "embedded"]

# Each package with its least version, as in pyproject.toml.
PACKAGES: dict[Extra, dict[str, str]] = {
    "model": {"torch": "2.6", "transformers": "5", "safetensors": "0.5"},
    "onnx": {"onnxruntime": "1.23.2", "tokenizers": "0.21"},
    "bundle": {"onnx": "1.19"},
    "lora": {"peft": "0.21"},
    "datasets": {"datasets": "5"},
    "embedded": {"amqtt": "0.11"},
}


def missing(extra: Extra) -> str | None:
    """What keeps an extra from being used, in words; None where all of it is installed. Imports nothing."""
    for package, least in PACKAGES[extra].items():
        if not _is_there(package):
            return f"{package} is not installed"
        with suppress(PackageNotFoundError):  # built by hand
            if _numbers(found := version(package)) < _numbers(least):
                return f"{package} {found} is installed, and {least} or newer is needed"
    return None


def need(extra: Extra, what: str) -> None:
    """Refuse what needs an extra that is not installed, before anything is begun.

    Raises:
        MissingExtra: names the package and the extra.
    """
    problem = missing(extra)
    if problem is not None:
        raise _refusal(extra, what, problem)


@contextmanager
def importing(extra: Extra, what: str) -> Iterator[None]:
    """Around imports of an extra's packages, or of our modules that import them.

    Raises:
        MissingExtra: it is not installed, or is damaged.
    """
    need(extra, what)
    try:
        yield
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        name = getattr(error, "name", None) or ""
        if name.startswith("meerkat_mq"):
            raise
        words = str(error).strip().partition("\n")[0]
        absent = isinstance(error, ModuleNotFoundError) and name
        problem = f"{name} is not installed" if absent else f"its packages cannot be imported ({words})"
        raise _refusal(extra, what, problem) from error


def _refusal(extra: Extra, what: str, problem: str) -> MissingExtra:
    return MissingExtra(what, f"needs the extra {extra!r}, but {problem}", f"pip install 'meerkat-mq[{extra}]'")


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", re.sub(r"[^\d.].*", "", text))]
