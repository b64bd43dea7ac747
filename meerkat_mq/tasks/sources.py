"""One reader of rows and texts: JSON lines, JSON arrays, CSV, TSV, plain text, folders, data sets. No torch."""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from meerkat_mq.config import HUB_DATA
from meerkat_mq.core.foreign import parse_json
from meerkat_mq.errors import DataError, reason, shown, shown_names
from meerkat_mq.extras import importing

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", ".ndjson", ".json", *DELIMITERS)  # of what a folder of data is read for
TEXT_SUFFIX = ".txt"
MOST_UNPACKED = 2**30  # bytes of a gzip file's content

_GZIP = b"\x1f\x8b"
_JSON = re.compile(r'\s*(\{\s*["}]|\[\s*[{"\]])')
_INTEGER = re.compile(r"-?\d{1,20}")

_ROWS = "write the rows as JSON lines, CSV or TSV"
_HUB = "give its folder as hf:<folder>:<split> (pip install 'meerkat-mq[datasets]'), or " + _ROWS
_UNPACK = "unpack it, or pack it with gzip"
_CODE = ", which is never loaded: it could run code"
_ZIP = "is a zip archive"

# What a file is, what to do with it, how its name ends, how it begins. Some kinds of files are zip archives too.
_KINDS: tuple[tuple[str, str, tuple[str, ...], tuple[bytes, ...]], ...] = (
    ("is a Parquet file", _HUB, (".parquet",), (b"PAR1",)),
    ("is an Arrow file", _HUB, (".arrow",), (b"ARROW1",)),
    ("is a Feather file", _HUB, (".feather",), (b"FEA1",)),
    ("is a NumPy archive", _ROWS, (".npz",), ()),
    ("is a NumPy array", _ROWS, (".npy",), (b"\x93NUMPY",)),
    ("is a spreadsheet", "save its sheet as CSV (UTF-8)", (".xlsx", ".xls", ".ods"), (b"\xd0\xcf\x11\xe0",)),
    ("is a PDF", "give its text", (".pdf",), (b"%PDF-",)),
    ("is a text document with formats", "save it as plain text (UTF-8)", (".docx",), ()),
    ("is a SQLite database", _ROWS, (".sqlite",), (b"SQLite format 3\0",)),
    ("is a pickle" + _CODE, _ROWS, (".pkl",), (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")),
    ("is a PyTorch file" + _CODE, _ROWS, (".pt",), ()),
    ("holds a model's weights", "give rows or text", (".safetensors", ".gguf"), (b"GGUF",)),
    ("is a mask", "give rows or text", (".mkm",), ()),
    (_ZIP, _UNPACK, (".zip",), (b"PK\x03\x04",)),
    ("is a tar archive", "unpack it, and give the folder", (".tar",), ()),
    ("is packed with bzip2", _UNPACK, (".bz2",), (b"BZh",)),
    ("is packed with xz", _UNPACK, (".xz",), (b"\xfd7zXZ",)),
    ("is packed with zstd", _UNPACK, (".zst",), (b"\x28\xb5\x2f\xfd",)),
    ("is a 7z archive", _UNPACK, (".7z",), (b"7z\xbc\xaf",)),
    ("is an HTML page", "give its text", (".html",), (b"<!doctype html", b"<html")),
)


class FileRow(dict[str, Any]):
    """A row that knows where it was read: file and line, or the data set's row."""

    __slots__ = ("where",)

    def __init__(self, values: dict[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where


def named_source(given: str) -> Path | str:
    """What a command line names: a path, or a data set's `hf:…`."""
    return given if given.startswith("hf:") else Path(given)


def place_of(row: object) -> str:
    """Where a row was read; "a row" of one that was made here."""
    return row.where if isinstance(row, FileRow) else "a row"


def data_files(source: Path, *, texts: bool = False) -> list[Path]:
    """A folder's data files, by name, also gzipped; of anything else, itself. `texts`: *.txt are data too.

    Raises:
        DataError: the folder cannot be read.
    """
    wanted = (*SUFFIXES, TEXT_SUFFIX) if texts else SUFFIXES
    try:
        if not source.is_dir():
            return [source]
        return sorted(file for file in source.iterdir() if _is_data(file, wanted))
    except OSError as error:
        raise DataError(str(source), f"cannot be read ({error.strerror})", "give a folder of data files") from error


def _is_data(file: Path, wanted: Sequence[str]) -> bool:
    return not file.name.startswith(".") and _suffix(file) in wanted and file.is_file()


def _suffix(path: Path) -> str:
    """The name's ending that says what a file holds: of `a.csv.gz`, ".csv"."""
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return plain.suffix.lower()


def records(
    source: Path | str, columns: Sequence[str] | None, integers: str | None = None, plain: str | None = None
) -> Iterator[FileRow]:
    """The rows of a source, as they stand there.

    Args:
        source: file, folder, or `hf:…`.
        columns: those that are needed; of `hf:…`, only these are read. None: all.
        integers: a column of integers, which a table knows only as text.
        plain: the field whose values paragraphs of plain text are; None: plain text is no rows.

    Raises:
        DataError: names the file, the line and what is wrong with it.
    """
    if isinstance(source, str):
        yield from _hub_records(source, columns)
        return
    for file in data_files(source, texts=plain is not None):
        content = _content(file)
        if plain is not None and _is_plain(file, content):
            yield from (FileRow({plain: text}, str(file)) for text in _paragraphs(file, content))
        elif _suffix(file) in DELIMITERS:
            yield from _table_rows(file, content, integers)
        elif content.lstrip().startswith("["):
            yield from _array_rows(file, content)
        else:
            yield from _line_rows(file, content)


def _is_plain(path: Path, content: str) -> bool:
    """Whether a file is plain text: by its name it holds no rows, and it does not begin like JSON."""
    return _suffix(path) not in SUFFIXES and not _JSON.match(content)


def _table_rows(path: Path, content: str, integers: str | None) -> Iterator[FileRow]:
    """Rows of a CSV or TSV file, whose first line names the columns."""
    csv.field_size_limit(sys.maxsize)  # the library's own is 128 KiB
    kind = _suffix(path)
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=DELIMITERS[kind], strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise DataError(where, f"is not {kind[1:].upper()} ({error})", "mend or remove the line") from error
        if values is None:
            return
        if not values:
            continue
        if header is None:
            header = values
            twice, times = next(((name, n) for name, n in Counter(header).items() if name and n > 1), (None, 1))
            if twice is not None:
                problem = f"has {times} columns {shown(twice)}"
                raise DataError(where, problem, "rename or remove all but one")
        elif len(values) != len(header):
            raise DataError(where, f"has {len(values)} columns, the header {len(header)}", "quote text with commas")
        else:
            row: dict[str, Any] = dict(zip(header, values, strict=True))
            if integers in row and _INTEGER.fullmatch(row[integers].strip()):
                row[integers] = int(row[integers])
            yield FileRow(row, where)


def _array_rows(path: Path, content: str) -> Iterator[FileRow]:
    """Rows of one JSON array of objects."""
    try:
        found = parse_json(content)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}", f"is not JSON ({error.msg})", "mend or remove the line") from error
    except ValueError as error:
        raise DataError(str(path), f"is not JSON ({error})", "mend the file") from error
    for number, value in enumerate(found, start=1):
        where = f"{path}: item {number}"
        yield FileRow(_object(value, where, "give an array of objects"), where)


def _line_rows(path: Path, content: str) -> Iterator[FileRow]:
    """Rows of JSON lines. Not splitlines(): JSON strings may hold U+2028 and its like as they are."""
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                value = parse_json(line)
            except ValueError as error:
                raise DataError(where, f"is not JSON ({error})", _remedy(path, content)) from error
            yield FileRow(_object(value, where, "mend or remove the line"), where)


def _remedy(path: Path, content: str) -> str:
    """What helps a line that is not JSON."""
    if _is_plain(path, content):
        return f"rows are JSON lines, a JSON array, or a table whose name ends in {' or '.join(DELIMITERS)}"
    try:
        whole = parse_json(content)
    except ValueError:
        return "mend or remove the line"
    return f"the file is one {type(whole).__name__}: write one object a line, or an array of objects"


def _object(value: Any, where: str, remedy: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(where, f"is {type(value).__name__}, not a JSON object", remedy)
    return value


def _paragraphs(path: Path, content: str) -> list[str]:
    """Those of plain text: parted by blank lines."""
    if "\0" in content:
        raise DataError(str(path), "holds NUL characters: it is not text", "give plain text, or a data file")
    whole = "\n".join(line.rstrip() for line in content.split("\n"))
    return [paragraph.strip() for paragraph in whole.split("\n\n") if paragraph.strip()]


def _content(path: Path) -> str:
    """A file's text, without its byte order mark; gzip is unpacked."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror})", "give the path of a data file") from error
    if data.startswith(_GZIP):
        data = _unpacked(path, data)
    _refuse_foreign(path, data)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        remedy = "it begins as UTF-16 does: save it as UTF-8" if wide else "save it as UTF-8"
        raise DataError(str(path), f"is not UTF-8 ({error.reason} at byte {error.start})", remedy) from error


def _refuse_foreign(path: Path, data: bytes) -> None:
    """Refuse what a known format begins with, and what is named as one: say what it is, and what to do."""
    tar = data[257:262] == b"ustar"
    start = data[:64].lstrip().lower() if data[:64].lstrip().startswith(b"<") else data[:64]
    ending = ".tar" if tar else _suffix(path)
    found = next((kind for kind in _KINDS if start.startswith(kind[3])), None)
    if tar or found is None or found[0] == _ZIP:
        found = next((kind for kind in _KINDS if ending in kind[2]), found)
    if found is not None:
        raise DataError(str(path), *found[:2])


def _unpacked(path: Path, data: bytes) -> bytes:
    try:
        with gzip.open(io.BytesIO(data)) as file:
            content = file.read(MOST_UNPACKED + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(str(path), f"is damaged gzip ({error})", "copy or pack it again") from error
    if len(content) > MOST_UNPACKED:
        raise DataError(str(path), f"unpacks to more than {MOST_UNPACKED >> 20} MiB", "divide it into smaller files")
    return content


def _hub_records(source: str, columns: Sequence[str] | None) -> Iterator[FileRow]:
    """Rows of a data set, of which only these columns are read: others may be images or dates."""
    match = HUB_DATA.fullmatch(source)
    if match is None:
        raise DataError(source, "is no hf:<folder or hub id>[,<config>]:<split>", "such as hf:imdb:train")
    with importing("datasets", source):
        import datasets  # noqa: PLC0415 - slow to import

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(match["path"], match["config"], split=match["split"], trust_remote_code=False)
    except Exception as error:  # the library, its readers and the hub's client raise all kinds
        problem = f"cannot be loaded ({reason(error)})"
        raise DataError(source, problem, "check folder or hub id, config, split, and the network") from error
    wanted: list[str] = list(rows.column_names if columns is None else columns)
    absent = [column for column in wanted if column not in rows.column_names]
    if absent:
        raise DataError(source, f"has no column {absent[0]!r}", f"it has {shown_names(rows.column_names, 'none')}")
    for number, row in enumerate(rows.select_columns(wanted)):
        yield FileRow(row, f"{source}: row {number}")
