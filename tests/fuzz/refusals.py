"""What a refusal must be, whatever the file holds."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meerkat_mq.errors import MeerkatError

LONGEST = 1000  # characters of a refusal, but for its path


def read_or_refused(read: Callable[[], Any], path: Path, number: int) -> MeerkatError | None:
    """Read a damaged file: it succeeds, or is refused in one line with the file and a remedy; anything else fails.

    Returns:
        The refusal; None where it was read.
    """
    refusal = None
    try:
        read()
    except MeerkatError as error:
        refusal = error
    except Exception:
        pytest.fail(f"mutant {number}, {path.read_bytes()[:300]!r}:\n{traceback.format_exc()[-3000:]}")
    if refusal is not None:
        said = str(refusal)
        assert said.isprintable(), f"mutant {number}: {said!r}"
        assert path.name in said, f"mutant {number} does not name its file: {said}"
        assert refusal.remedy, f"mutant {number} has no remedy: {said}"
        assert len(said) - len(str(path)) < LONGEST, f"mutant {number}: {said}"
    return refusal
