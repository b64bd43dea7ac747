"""Whatever a library raises becomes one error in words. They raise all kinds: assertions, panics of Rust too."""

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from meerkat_mq.errors import MeerkatError, ModelError, cut, reason

_FIELD = re.compile(r"Validation error for '?(?:field )?'?(\w+)'?")


@contextmanager
def in_words(where: str | Callable[[str], str], what: str, remedy: str) -> Iterator[None]:
    """Errors of a library inside this block become ModelErrors.

    Args:
        where: the file or folder that the library reads; or what finds it, and the key in it, from the library's words.
        what: what then holds of it, such as "cannot be loaded".
        remedy: what to do about it.
    """
    try:
        yield
    except (MeerkatError, KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        place = where if isinstance(where, str) else where(str(error))
        raise ModelError(place, f"{what} ({reason(error)})", remedy) from error


def key_of(said: str, table: Mapping[str, object]) -> str | None:
    """The key of a table that a library's words are about: it says its name, or quotes its value."""
    field = _FIELD.search(said)
    if field:
        return cut(field[1])
    quoted = (key for key, value in table.items() if isinstance(value, str) and len(value) > 1 and f"'{value}'" in said)
    named = (key for key in table if re.search(rf"\b{re.escape(key)}\b", said))
    key = next(quoted, None) or next(named, None)
    return key and cut(key)
