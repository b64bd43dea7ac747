"""What all sections of a configuration share: a strict base class, and the types of their keys."""

import errno
import re
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Dtype = Literal["float32", "bfloat16", "float16"]
Device = Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")]
Seconds = Annotated[float, Field(gt=0, le=86_400 * 7)]
EngineName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*(:[A-Za-z_][A-Za-z0-9_]*)?$", max_length=200)]
Share = Annotated[float, Field(gt=0, le=1)]
Codec = Literal["float32", "bfloat16", "int8"]
Flag = Annotated[bool, Field(strict=True)]
FIXED: Final = "fixed"  # in a key's annotation: the key cannot change while a run lasts
LocalPath = Path  # relative paths are taken from the folder of the TOML file

HUB_DATA = re.compile(r"hf:(?P<path>[^,:]+)(,(?P<config>[^,:]+))?:(?P<split>[^\[\]:]+(\[[^\[\]]+\])?)")


def data_source(value: object) -> Path | str:
    """Where rows are: a file's path, or `hf:<folder or hub id>[,<config>]:<split>` for the `datasets` library.

    Raises:
        ValueError: neither.
    """
    if isinstance(value, str) and value.startswith("hf:"):
        if HUB_DATA.fullmatch(value) is None:
            raise ValueError("must be hf:<folder or hub id>[,<config>]:<split>")
        return value
    if not isinstance(value, str | Path):
        raise ValueError("Input is not a valid path")
    return Path(value)


def in_vain(problem: str) -> PydanticCustomError:
    """A key that would change nothing; its value says nothing either, and is not shown."""
    return PydanticCustomError("in_vain", "{problem}", {"problem": problem})


DataSource = Annotated[Path | str, PlainValidator(data_source)]


_NAMES_OR_PATHS = ("model", "source", "task")  # a hub id or built-in name, unless there is such a file or folder
_DATA = ("data", "train", "validation")


def _is_there(path: Path, *, strict: bool = False) -> bool:
    """Strict: a ValueError of a path that no file system takes."""
    try:
        return path.exists()
    except OSError as error:
        if strict and error.errno == errno.ENAMETOOLONG:
            raise ValueError("must be a path that can exist: no name in it longer than 255 bytes") from None
        return False


class Closed(BaseModel):
    """Base of all that comes from outside: frozen, unknown keys refused, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Section(Closed):
    """Base of all sections: paths are relative to the TOML file."""

    @field_validator("*", mode="after")
    @classmethod
    def _anchor_paths(cls, value: object, info: ValidationInfo) -> object:
        if any("\0" in str(part) for part in (value if isinstance(value, tuple) else (value,))):
            raise ValueError("must not hold a NUL character")
        if isinstance(value, Path):
            _is_there(value, strict=True)
        folder = (info.context or {}).get("folder")
        if folder is None:
            return value
        if isinstance(value, str) and info.field_name in _NAMES_OR_PATHS and _is_there(folder / value):
            return str(folder / value)
        if isinstance(value, tuple) and info.field_name == "tasks":
            # a sweep's are sections, whose own paths are anchored already
            return tuple(
                str(folder / task) if isinstance(task, str) and _is_there(folder / task) else task for task in value
            )
        if isinstance(value, str) and info.field_name in _DATA and (match := HUB_DATA.fullmatch(value)):
            path = folder / match["path"]
            return f"hf:{path if _is_there(path) else match['path']}{value[match.end('path') :]}"
        return folder / value if isinstance(value, Path) else value
