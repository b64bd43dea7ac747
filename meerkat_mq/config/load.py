"""TOML in, checked objects out; every error names the file, the key and the remedy."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from meerkat_mq.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def load_config(path: Path, kind: type[ConfigT]) -> ConfigT:
    """Read a TOML file.

    Raises:
        ConfigError: the file is missing, is not TOML, or a key is wrong; names the file and the key.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read ({error.strerror})", "give the path of a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"is not TOML ({error})", "see docs/configuration.md") from error
    return check_config(table, kind, where=str(path), folder=path.resolve().parent)


def check_config(table: object, kind: type[ConfigT], *, where: str, folder: Path | None = None) -> ConfigT:
    """Check a table against a configuration class.

    Raises:
        ConfigError: names the first key that is wrong, the value found and what it must be.
    """
    try:
        return kind.model_validate(table, context={"folder": folder})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "file"
        hidden = (
            first["type"] in ("missing", "extra_forbidden") or isinstance(first["input"], dict) or "password" in key
        )
        found = "" if hidden else f", not {first['input']!r}"
        raise ConfigError(
            f"{where}: {key}", f"{_plain(first['type'], first['msg'])}{found}", _REMEDY.get(first["type"], "")
        ) from error


def to_toml(table: Mapping[str, Any]) -> str:
    """A table as TOML: its plain values, then its sections, one deep."""
    plain = [
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n"
        for key, value in table.items()
        if not isinstance(value, Mapping)
    ]
    sections = [f"\n[{key}]\n{to_toml(value)}" for key, value in table.items() if isinstance(value, Mapping)]
    return "".join(plain + sections)


_REMEDY = {
    "missing": "add the key",
    "extra_forbidden": "remove the key or mend its spelling",
    "string_pattern_mismatch": "ids are 1 to 64 letters, digits, '_' and '-'; hashes are hex",
}


_PLAIN = {
    "missing": "is missing",
    "extra_forbidden": "is unknown",
    "model_type": "must be a table",
    "tuple_type": "must be an array",
    "too_short": "must have at least one item",
}


def _plain(kind: str, message: str) -> str:
    """A message in TOML's words."""
    text = message.removeprefix("Value error, ")
    return _PLAIN.get(kind, text[:1].lower() + text[1:])
