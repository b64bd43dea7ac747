"""Files that are neither rows nor text: what they are, and what to do with them. No torch."""

from pathlib import Path

from meerkat_mq.errors import DataError

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


def refuse_foreign(path: Path, data: bytes) -> None:
    """Refuse what a known format begins with, and what is named as one.

    Raises:
        DataError: says what the file is, and what to do.
    """
    tar = data[257:262] == b"ustar"
    start = data[:64].lstrip().lower() if data[:64].lstrip().startswith(b"<") else data[:64]
    ending = ".tar" if tar else (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()
    found = next((kind for kind in _KINDS if start.startswith(kind[3])), None)
    if tar or found is None or found[0] == _ZIP:
        found = next((kind for kind in _KINDS if ending in kind[2]), found)
    if found is not None:
        raise DataError(str(path), *found[:2])
