"""A bundle from a web server, by the hash of its manifest.

The node's owner names the address and the SHA-256 of `bundle.json`. The manifest names the other files with their sizes
and hashes, so the one hash pins every byte. Whoever serves the files is not trusted, and neither is who stands between:
plain HTTP is as good as HTTPS.

Nothing that comes from the network ends a node. Silence, a broken connection, an error of the server, a wrong byte (of
a hotel's log-in page, say): each is told, and tried again after a pause. The pauses double, up to a minute, or after
wrong bytes up to an hour, which bounds what a hostile server can make a node fetch. What came is kept, and the next try
asks only for the rest. Only the pinned manifest itself can be final: what it says is the owner's choice.

Files are written under a name of their own, and get theirs once their hash is right; the manifest comes last. So a
folder with a manifest is complete, and a node that is killed goes on where it was.
"""

import hashlib
import http.client
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO, Final
from urllib import request
from urllib.error import HTTPError

from meerkat_mq.config import BundleConfig
from meerkat_mq.core.foreign import read_regular
from meerkat_mq.engines.onnx.manifest import MANIFEST, MOST_MANIFEST, manifest_of
from meerkat_mq.errors import ModelError, reason

_PIECE: Final = 1 << 16  # bytes
_SILENCE_S: Final = 20.0  # of a connection
_TROUBLE_S: Final = 1.0, 60.0  # the first pause, and the longest
_WRONG_S: Final = 60.0, 3600.0  # after wrong bytes

Say = Callable[[str], None]


class _Trouble(Exception):
    """Why a try failed. `wrong`: of bytes that were not the bundle's; else of what a network does."""

    def __init__(self, problem: str, *, wrong: bool = False) -> None:
        super().__init__(problem)
        self.wrong = wrong


class _Stopped(Exception):
    """Nobody wants the bundle any more."""


def fetch_bundle(wanted: BundleConfig, folder: Path, say: Say, stop: threading.Event) -> None:
    """Fetch what a folder lacks of a bundle; blocking, until it is there.

    Args:
        folder: made where it is missing; only this function writes in it.
        say: told of each try that failed, and of the pause after it.
        stop: ends it, at the next piece; nothing is raised.

    Raises:
        ModelError: the manifest of this hash is none, or names more bytes than the limit allows.
    """
    source, pause = _Source(wanted, folder, stop), 0.0
    while not stop.is_set() and not (folder / MANIFEST).exists():
        source.came = 0
        try:
            source.fetch()
        except _Stopped:
            return
        except (_Trouble, OSError) as error:
            first, most = _WRONG_S if isinstance(error, _Trouble) and error.wrong else _TROUBLE_S
            pause = first if source.came else min(max(first, 2 * pause), most)
            say(f"{reason(error)}; trying again in {pause:g} s")
            stop.wait(pause)


class _Source:
    """The address that a bundle is fetched from.

    Attributes:
        came: bytes of this try that are kept.
    """

    def __init__(self, wanted: BundleConfig, folder: Path, stop: threading.Event) -> None:
        self._wanted, self._folder, self._stop = wanted, folder, stop
        self.came = 0
        self._opener = request.OpenerDirector()  # no files, no FTP: also not where a redirection leads to one
        for handler in (
            request.ProxyHandler, request.UnknownHandler, request.HTTPHandler, request.HTTPSHandler,
            request.HTTPDefaultErrorHandler, request.HTTPRedirectHandler, request.HTTPErrorProcessor,
        ):  # fmt: skip
            self._opener.add_handler(handler())

    def fetch(self) -> None:
        """One try."""
        self._folder.mkdir(parents=True, exist_ok=True)
        manifest = self._file(MANIFEST, None, self._wanted.sha256)
        files = manifest_of(read_regular(manifest, MOST_MANIFEST), self._at(MANIFEST)).files
        total = sum(facts.bytes for facts in files.values())
        if total > self._wanted.max_mib << 20:
            problem = f"has {total:,} bytes, more than max_mib = {self._wanted.max_mib:,} allows"
            raise ModelError(self._wanted.url, problem, "raise bundle.max_mib, if the disk has room")
        for name in sorted(files):
            if not (self._folder / name).exists():
                self._file(name, files[name].bytes, files[name].sha256).replace(self._folder / name)
        manifest.replace(self._folder / MANIFEST)

    def _at(self, name: str) -> str:
        return f"{self._wanted.url.rstrip('/')}/{name}"

    def _file(self, name: str, size: int | None, sha256: str) -> Path:
        """A file with the right hash, where it can be looked at; of a size that is not known: fetched anew or whole."""
        part = self._folder / f"{name}.part"
        if (have := _size(part)) and (size is None or have >= size):
            if _hash(part) == sha256:
                return part
            part.unlink()
        self._fill(name, part, MOST_MANIFEST if size is None else size)
        if size is not None and _size(part) < size:
            raise _Trouble(f"{self._at(name)}: the connection broke off after {_size(part):,} bytes")
        if (found := _hash(part)) != sha256:
            raise self._wrong(name, part, f"has the SHA-256 {found[:16]}…, not {sha256[:16]}…")
        return part

    def _fill(self, name: str, part: Path, most: int) -> None:
        """Append what a file lacks."""
        have = _size(part)
        asked = request.Request(self._at(name), headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310
        try:
            answer = self._opener.open(asked, timeout=min(_SILENCE_S, self._wanted.timeout_s))
        except HTTPError as error:
            error.close()
            if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)
            raise _Trouble(f"{self._at(name)}: the server answers {error.code}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _Trouble(f"{self._at(name)}: {reason(error)}") from error
        resumed = answer.status == HTTPStatus.PARTIAL_CONTENT
        with answer, part.open("ab" if resumed else "wb") as out:
            self._copy(name, answer, out, most)
        if _size(part) > most:
            raise self._wrong(name, part, f"is larger than {most:,} bytes")

    def _copy(self, name: str, answer: http.client.HTTPResponse, out: BinaryIO, most: int) -> None:
        """What comes, up to a byte more than there may be."""
        until = time.monotonic() + self._wanted.timeout_s
        while out.tell() <= most:
            if self._stop.is_set():
                raise _Stopped
            if time.monotonic() > until:
                raise _Trouble(f"{self._at(name)}: a connection lasts at most timeout_s = {self._wanted.timeout_s:g}")
            try:
                piece = answer.read1(_PIECE)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _Trouble(f"{self._at(name)}: {reason(error)}") from error
            if not piece:
                return
            self.came += len(piece)
            out.write(piece)

    def _wrong(self, name: str, part: Path, problem: str) -> _Trouble:
        part.unlink()
        self.came = 0
        remedy = "bundle.url and bundle.sha256 must be those of one bundle"
        return _Trouble(f"{self._at(name)}: {problem}: {remedy}", wrong=True)


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _hash(part: Path) -> str:
    with part.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
