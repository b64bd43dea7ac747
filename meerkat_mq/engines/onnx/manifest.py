"""A bundle: a folder with a manifest, which is checked before anything is loaded, and the three files that it names.

A bundle may come from anybody. So its manifest has a closed schema and bounds; its files have fixed names, and are
regular files in the folder; each has the size and the hash that the manifest says; the graph consists of known
operations only (`graph_check`); and what the weights file holds is looked up by name, format and shape. Nothing of a
bundle is ever run as code. The hashes find damage. Who made the bundle is not known from them: that the weights are
the run's base is checked where theta_0 is, and the fingerprint is what its maker says.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from meerkat_mq.config import check_config
from meerkat_mq.config.section import Closed
from meerkat_mq.core.foreign import open_regular, parse_json, read_regular, real_file
from meerkat_mq.engines.onnx.graph_check import check_graph
from meerkat_mq.engines.onnx.layout import AGAIN, WeightsFile
from meerkat_mq.engines.onnx.quantise import Weights
from meerkat_mq.engines.onnx.tokens import BundleTokenizer, Chat
from meerkat_mq.errors import ConfigError, ModelError, ModelNotFound, reason, shown

MANIFEST: Final = "bundle.json"
GRAPH: Final = "graph.onnx"
PREFIX: Final = "prefix.onnx"  # of the frozen blocks, where there are any; then the other one begins above them
WEIGHTS: Final = "weights.safetensors"
TOKENIZER: Final = "tokenizer.json"

_FORMAT: Final = 2  # 1: texts in lines of one length throughout
MOST_MANIFEST: Final = 16 << 20  # bytes
_MOST: Final = {GRAPH: 64 << 20, PREFIX: 64 << 20, TOKENIZER: 128 << 20, WEIGHTS: 1 << 40}
_PIECE: Final = 1 << 20

Name = Annotated[str, Field(min_length=1, max_length=255)]
Size = Annotated[int, Field(ge=1, lt=2**31)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Token = Annotated[int, Field(ge=0, lt=2**31)]


class FileFacts(Closed):
    """What a file of a bundle must be: its bytes, and their SHA-256."""

    bytes: Annotated[int, Field(ge=1, le=1 << 40)]
    sha256: Hash


class Table(Closed):
    """A table of the weights file of which rows are looked up."""

    name: Name
    shape: tuple[Size, Size]


class ChatTexts(Closed):
    """A chat as the tokenizer's template renders it around words that stand for the messages (`continuations`).

    Attributes:
        asked, whole: up to where the assistant is to answer, and with the answer.
    """

    asked: Annotated[str, Field(max_length=1 << 16)]
    whole: Annotated[str, Field(max_length=1 << 16)]


class Manifest(Closed):
    """`bundle.json`.

    Attributes:
        kind: of model.
        weights: how linear weights are stored.
        fingerprint, tokenizer_fingerprint: of the base model, as in masks.
        max_tokens: longest input that the model takes; positions: that the graph takes.
        start: ids before every text of a causal LM; pad: the id that fills up; end: the one after an answer.
        chat, chat_with_system: None where the template cannot be used like this, or there is none.
        embedding, head, embed_scale, head_cap: as `families.Described`.
        frozen: blocks below the mask, in a graph of their own; 0: none.
        matrices: the weights that take theta, with their shapes.
        files: the other files of the folder.
    """

    format: Literal[2]
    kind: Literal["causal", "encoder"]
    weights: Weights
    fingerprint: Hash
    tokenizer_fingerprint: Hash
    max_tokens: Annotated[int, Field(ge=8, le=2**31)]
    positions: Annotated[int, Field(ge=8, le=8192)]
    start: Annotated[tuple[Token, ...], Field(max_length=64)]
    pad: Token
    end: Token | None
    chat: ChatTexts | None
    chat_with_system: ChatTexts | None
    embedding: Table
    head: Table | None
    embed_scale: Annotated[float, Field(gt=0)]
    head_cap: Annotated[float, Field(gt=0)] | None
    frozen: Annotated[int, Field(ge=0, le=65536)] = 0
    matrices: Annotated[dict[Name, tuple[Size, Size]], Field(min_length=1, max_length=65536)]
    files: dict[Literal["graph.onnx", "prefix.onnx", "weights.safetensors", "tokenizer.json"], FileFacts]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that was looked at. Implements `prompts.Reader`."""

    folder: Path
    manifest: Manifest
    graph: bytes
    below: bytes | None
    weights: WeightsFile
    tokenizer: BundleTokenizer

    @property
    def max_tokens(self) -> int:
        """Longest input in tokens."""
        return self.manifest.max_tokens

    @property
    def start(self) -> tuple[int, ...]:
        """The ids before every text."""
        return self.manifest.start


def open_bundle(folder: Path) -> Bundle:
    """Open a bundle, after a look at all of it; slow: every byte is hashed.

    Raises:
        ModelNotFound: there is no bundle.
        ModelError: it is damaged, or holds anything but what a bundle may.
    """
    manifest = read_manifest(folder)
    paths = {name: _checked(folder, name, facts) for name, facts in manifest.files.items()}
    graphs = {name: _graph(paths[name], manifest.files[name]) for name in (GRAPH, PREFIX) if name in paths}
    tokenizer = BundleTokenizer(paths[TOKENIZER], manifest.pad, manifest.end, _chats(manifest))
    if (found := tokenizer.fingerprint()) != bytes.fromhex(manifest.tokenizer_fingerprint):
        problem = f"gives other ids than the manifest says: fingerprint {found.hex()[:16]}…"
        raise ModelError(str(paths[TOKENIZER]), problem, AGAIN)
    weights = WeightsFile(paths[WEIGHTS], manifest.weights)
    return Bundle(folder, manifest, graphs[GRAPH], graphs.get(PREFIX), weights, tokenizer)


def _graph(path: Path, facts: FileFacts) -> bytes:
    graph = read_regular(path, _MOST[GRAPH])
    if hashlib.sha256(graph).hexdigest() != facts.sha256:
        raise _damaged(path)
    check_graph(graph, str(path))
    return graph


def _chats(manifest: Manifest) -> tuple[Chat | None, Chat | None]:
    plain, ruled = (
        None if found is None else (found.asked, found.whole) for found in (manifest.chat, manifest.chat_with_system)
    )
    return plain, ruled


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle, checked.

    Raises:
        ModelNotFound, ModelError: as `open_bundle`.
    """
    place = folder / MANIFEST
    if not folder.is_dir() or not place.exists():
        remedy = "give the folder that `meerkat bundle` wrote"
        raise ModelNotFound(str(folder), f"is no bundle: there is no {MANIFEST} in it", remedy)
    try:
        data = read_regular(real_file(place, folder), MOST_MANIFEST)
    except OSError as error:
        raise ModelError(str(place), f"cannot be used ({reason(error)})", AGAIN) from error
    return manifest_of(data, str(place))


def manifest_of(data: bytes, place: str) -> Manifest:
    """The manifest of these bytes, checked; `place`, for errors, is where they are from.

    Raises:
        ModelError: as `open_bundle`.
    """
    try:
        found: Any = parse_json(data)
    except ValueError as error:
        raise ModelError(place, f"cannot be used ({reason(error)})", AGAIN) from error
    if isinstance(found, dict) and found.get("format", _FORMAT) != _FORMAT:
        problem = f"is of format {shown(found['format'])}, not {_FORMAT}"
        raise ModelError(place, problem, f"{AGAIN}, with this version of meerkat-mq")
    try:
        manifest = check_config(found, Manifest, where=place)
    except ConfigError as error:
        raise ModelError(error.where, error.problem, AGAIN) from error
    needed = _MOST.keys() if manifest.frozen else _MOST.keys() - {PREFIX}
    if manifest.files.keys() - needed:
        raise ModelError(f"{place}: frozen", f"is 0, and {PREFIX} is there", AGAIN)
    if lacking := sorted(needed - manifest.files.keys()):
        raise ModelError(f"{place}: files", f"does not name {lacking[0]}", AGAIN)
    if (manifest.kind == "causal") != (manifest.head is not None):
        raise ModelError(f"{place}: head", "is there for causal models, and for no others", AGAIN)
    return manifest


def _checked(folder: Path, name: str, facts: FileFacts) -> Path:
    """A file of a bundle, if it has the size and the hash that it must have."""
    path = real_file(folder / name, folder)
    digest = hashlib.sha256()
    try:
        with open_regular(path) as stream:
            if stream.seek(0, 2) != facts.bytes or facts.bytes > _MOST[name]:
                raise _damaged(path)
            stream.seek(0)
            while piece := stream.read(_PIECE):
                digest.update(piece)
    except OSError as error:
        raise ModelError(str(path), f"cannot be read ({error.strerror})", AGAIN) from error
    if digest.hexdigest() != facts.sha256:
        raise _damaged(path)
    return path


def _damaged(path: Path) -> ModelError:
    return ModelError(str(path), f"is not the file that {MANIFEST} describes, by size or SHA-256", AGAIN)
