"""TOML in, checked objects out; every error names the file, the key and the remedy."""

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from meerkat_mq.errors import ConfigError, cut, shown

MESSAGE_SHOWN = 300
SEE = "see docs/configuration.md"

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def load_config(path: Path, kind: type[ConfigT]) -> ConfigT:
    """Read a TOML file.

    Raises:
        ConfigError: the file is missing, is not TOML, or a key is wrong; names the file and the key.
    """
    return check_config(read_toml(path), kind, where=str(path), folder=path.resolve().parent)


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's table, without a byte order mark; ConfigError where it is missing, or is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read ({error.strerror})", "give the path of a TOML file") from error
    except (ValueError, RecursionError) as error:  # also not UTF-8, and numbers with thousands of digits
        raise ConfigError(str(path), f"is not TOML ({cut(str(error), MESSAGE_SHOWN)})", SEE) from error


def check_config(table: object, kind: type[ConfigT], *, where: str, folder: Path | None = None) -> ConfigT:
    """Check a table against a configuration class; `where` is the file's name, or "".

    Raises:
        ConfigError: names the first key that is wrong, the value found and what it must be.
    """
    try:
        return kind.model_validate(table, context={"folder": folder})
    except ValidationError as error:
        wrong = error.errors(include_url=False)
        unknown = (one for one in wrong if one["type"] == "extra_forbidden")
        first = next(unknown, wrong[0])  # a typo leaves its key missing
        key = ".".join(cut(str(part)) for part in first["loc"]) or "file"
        hidden = first["type"] in _SAY_ALL or isinstance(first["input"], dict) or "password" in key
        found = "" if hidden else f", not {shown(_without_secrets(first['input'], is_url=key.endswith('url')))}"
        meant = _meant(first["loc"], kind) if first["type"] == "extra_forbidden" else None
        remedy = meant or _REMEDY.get(first["type"], SEE)
        raise ConfigError(f"{where}: {key}" if where else key, f"{_plain(first)}{found}", remedy) from error


def _meant(unknown: tuple[int | str, ...], kind: type[BaseModel]) -> str | None:
    """The remedy where a known key of the same section is spelt nearly like the unknown one."""
    *sections, name = map(str, unknown)
    section: type[BaseModel] | None = kind
    for part in sections:
        field = section.model_fields.get(part) if section else None
        within = (field.annotation, *get_args(field.annotation)) if field else ()
        section = next((one for one in within if isinstance(one, type) and issubclass(one, BaseModel)), None)
    near = difflib.get_close_matches(name, section.model_fields, n=1) if section else []
    return f"write '{near[0]}', or remove the key" if near else None


def _without_secrets(value: object, *, is_url: bool = False) -> object:
    """A value for an error: of a URL, without what may be a password; of a table, nothing."""
    if isinstance(value, list | tuple):
        return [_without_secrets(one, is_url=is_url) for one in value]
    if isinstance(value, dict):
        return {}
    if not isinstance(value, str) or not (is_url or "://" in value or "@" in value):
        return value
    start, sign, rest = value.partition("://") if "://" in value else ("", "", value)
    *credentials, place = re.split(r"@|%40", rest)
    host = re.match(r"(\[[^\]]*\]|[^:/?#]*)(:[0-9]{0,5}\Z)?", place)
    assert host is not None
    hidden = "" if host.end() == len(place) else f"{place[host.end()]}***"
    return f"{start}{sign}{'***@' if credentials else ''}{host[0]}{hidden}"


_SAY_ALL = ("missing", "extra_forbidden", "in_vain")  # they need no value found

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
    "string_type": "must be a string",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
}


def _plain(error: ErrorDetails) -> str:
    """A message in TOML's words."""
    known = _PLAIN.get(error["type"])
    if known is None:
        text = error["msg"].removeprefix("Value error, ")
        return cut(text[:1].lower() + text[1:], MESSAGE_SHOWN)
    return re.sub(r"\b1 (\w+)s$", r"one \1", known.format_map(error.get("ctx", {})))
