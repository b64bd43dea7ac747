"""Files that are neither rows nor text: what they are, and what to do with them. No torch."""

from pathlib import Path

from meerkat_mq.errors import DataError

_ROWS = "write the rows as JSON lines, CSV or TSV"
_HUB = "give its folder as hf:<folder>:<split> (pip install 'meerkat-mq[datasets]'), or " + _ROWS
_UNPACK = "unpack it, or pack it with gzip"

_KINDS = {
    ".parquet": ("is a Parquet file", _HUB),
    ".arrow": ("is an Arrow file", _HUB),
    ".feather": ("is a Feather file", _HUB),
    ".npz": ("is a NumPy archive", _ROWS),
    ".npy": ("is a NumPy array", _ROWS),
    ".xlsx": ("is a spreadsheet", "save its sheet as CSV (UTF-8)"),
    ".xls": ("is a spreadsheet", "save its sheet as CSV (UTF-8)"),
    ".ods": ("is a spreadsheet", "save its sheet as CSV (UTF-8)"),
    ".pdf": ("is a PDF", "give its text"),
    ".docx": ("is a text document with formats", "save it as plain text (UTF-8)"),
    ".sqlite": ("is a SQLite database", _ROWS),
    ".pkl": ("is a pickle, which is never loaded: it could run code", _ROWS),
    ".pt": ("is a PyTorch file, which is never loaded: it could run code", _ROWS),
    ".safetensors": ("holds a model's weights", "give rows or text"),
    ".gguf": ("holds a model's weights", "give rows or text"),
    ".mkm": ("is a mask", "give rows or text"),
    ".zip": ("is a zip archive", _UNPACK),
    ".tar": ("is a tar archive", "unpack it, and give the folder"),
    ".bz2": ("is packed with bzip2", _UNPACK),
    ".xz": ("is packed with xz", _UNPACK),
    ".zst": ("is packed with zstd", _UNPACK),
    ".7z": ("is a 7z archive", _UNPACK),
    ".html": ("is an HTML page", "give its text"),
}

_BEGINNINGS = (
    (b"PAR1", ".parquet"),
    (b"ARROW1", ".arrow"),
    (b"FEA1", ".feather"),
    (b"\x93NUMPY", ".npy"),
    (b"\xd0\xcf\x11\xe0", ".xls"),
    (b"%PDF-", ".pdf"),
    (b"SQLite format 3\0", ".sqlite"),
    (b"\x80\x02", ".pkl"),
    (b"\x80\x03", ".pkl"),
    (b"\x80\x04", ".pkl"),
    (b"\x80\x05", ".pkl"),
    (b"GGUF", ".gguf"),
    (b"PK\x03\x04", ".zip"),
    (b"BZh", ".bz2"),
    (b"\xfd7zXZ", ".xz"),
    (b"\x28\xb5\x2f\xfd", ".zst"),
    (b"7z\xbc\xaf", ".7z"),
    (b"<!doctype html", ".html"),
    (b"<html", ".html"),
)
_ZIPPED = (".npz", ".xlsx", ".ods", ".docx", ".pt")  # archives with an ending of their own


def refuse_foreign(path: Path, data: bytes) -> None:
    """Refuse what a known format begins with, and what is named as one.

    Raises:
        DataError: says what the file is, and what to do.
    """
    start = data[:64].lstrip().lower() if data[:64].lstrip().startswith(b"<") else data[:64]
    named = path.with_suffix("").suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    kind = next((kind for beginning, kind in _BEGINNINGS if start.startswith(beginning)), None)
    if data[257:262] == b"ustar":
        kind = ".tar"
    if named in _KINDS and (kind is None or (kind == ".zip" and named in _ZIPPED)):
        kind = named
    if kind is not None:
        raise DataError(str(path), *_KINDS[kind])
