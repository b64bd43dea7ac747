"""Whatever a library raises becomes one error in words. They raise all kinds: assertions, panics of Rust too."""

import asyncio
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from meerkat_mq.errors import MeerkatError, ModelError

_FIELD = re.compile(r"Validation error for '?(?:field )?'?(\w+)'?")
_LONGEST = 300


@contextmanager
def in_words(where: str, what: str, remedy: str, table: Mapping[str, object] | None = None) -> Iterator[None]:
    """Errors of a library inside this block become ModelErrors, with the key of the file where it is known.

    Args:
        where: the file or folder that the library reads.
        what: what then holds of it, such as "cannot be loaded".
        remedy: what to do about it.
        table: what the file holds.
    """
    try:
        yield
    except (MeerkatError, KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        key = _key(str(error), table or {})
        raise ModelError(f"{where}: {key}" if key else where, f"{what} ({reason(error)})", remedy) from error


def _key(said: str, table: Mapping[str, object]) -> str | None:
    """The key of a table that a library's words are about: it says its name, or quotes its value."""
    field = _FIELD.search(said)
    if field:
        return field[1]
    quoted = (key for key, value in table.items() if isinstance(value, str) and len(value) > 1 and f"'{value}'" in said)
    named = (key for key in table if re.search(rf"\b{re.escape(key)}\b", said))
    return next(quoted, None) or next(named, None)


def reason(error: BaseException) -> str:
    """What an error says, in one short line."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not said:
        return type(error).__name__
    line = " ".join(said[:2]) if said[0].endswith(":") else said[0]
    words = f"{type(error).__name__}: {line}" if isinstance(error, KeyError | AttributeError | AssertionError) else line
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]}…"
