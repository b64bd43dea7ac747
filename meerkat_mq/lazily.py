"""Names of a package that are imported when they are first used.

`python -m` runs a package before its `__main__`, and signals would wait for what that imports (observe/start.py): here
and in these packages, not even `typing` is.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def lazily(package: str, homes: "Mapping[str, str]") -> "Callable[[str], Any]":
    """A package's `__getattr__`, which finds each name in its module."""

    def find(name: str) -> "Any":
        from importlib import import_module  # noqa: PLC0415

        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return find
