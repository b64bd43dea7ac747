"""The control plane: JSON that people debug with `mosquitto_sub`."""

import json
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from meerkat_mq.config import Closed, Count, Directions, EngineName, Identifier, RunSpec
from meerkat_mq.errors import BadValue, TooLarge, UnknownKey
from meerkat_mq.wire.frames import MAX_STEPS, most_terms

MAX_CONTROL_BYTES = 64 * 1024
MAX_RUN_WEIGHTS = 2**26
MAX_REFUSES = 300  # characters
REFUSES = "refuses: "  # begins the words of a status that says why

# How a mask is compressed and where a model lies may change within a run: hashes say what they are.
MAY_CHANGE = frozenset({"mask_blob", "mask_bytes", "mask_chunks", "model", "max_step"})
_YOUNGER = {"perturbations", "mode", "max_staleness"}  # than the first descriptors; so is what is None by default
_ALWAYS_SAID = {key for key, field in RunSpec.model_fields.items() if field.default is not None} - _YOUNGER

U32 = Annotated[int, Field(ge=0, lt=2**32)]
RunId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ControlMessage(Closed):
    """Base of all JSON messages; `sender` says to people who sends it."""

    sender: ClassVar[str] = "server"

    def encode(self) -> bytes:
        """Compact JSON, UTF-8."""
        return self.model_dump_json(exclude_none=True).encode()


class TaskDescription(ControlMessage):
    """A run's task, as `tasks` wrote it and reads it: to the wire, JSON with a name for people."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    name: Annotated[str, Field(min_length=1, max_length=64)]


class _Subject(ControlMessage):
    """What a run is of."""

    protocol: Literal[1] = 1
    federation: Identifier
    run: RunId
    engine: EngineName  # "transformers", "toy" for drills, or "package.module:factory" (docs/engines.md)
    model: str  # name of the base model, for people
    task: TaskDescription | None = None
    dtype: Literal["float32", "bfloat16", "float16"]
    fingerprint: Fingerprint
    tokenizer: Fingerprint
    mask: Hash
    mask_bytes: U32  # size of the encoded mask, in `mask_chunks` chunks
    mask_chunks: Annotated[int, Field(ge=1, le=65536)]
    weights: Annotated[int, Field(ge=1, le=MAX_RUN_WEIGHTS)]  # n, of the mask


class RunDescriptor(RunSpec, _Subject):
    """All that a node must know of a run besides its own data and base model; retained on `…/run`.

    Between `weights` and `values` come the keys of `RunSpec`, under their names in `federation.toml`, but for `count`,
    which is `rounds` on the wire. `mask_blob` is the hash of the encoded mask, where its chunks have that name; else
    they have the mask hash. `max_step`: no coefficient of an entry is larger in magnitude; None: 2⁶⁴. `completion`:
    fingerprint of what stands around the texts of a completion; None: of other tasks, and of older runs.
    """

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True)

    count: Count = Field(alias="rounds")
    directions: Directions
    values: bool = False  # whether nodes may send displacements (docs/values.md)
    max_step: Annotated[float, Field(gt=0, le=2.0**64)] | None = None
    mask_blob: Hash | None = None
    completion: Fingerprint | None = None

    @model_validator(mode="after")
    def _says_all(self) -> Self:
        if missing := sorted(_ALWAYS_SAID - self.model_fields_set):
            raise PydanticCustomError("missing", "Field required", {"loc": missing[:1]})
        return self

    @model_validator(mode="after")
    def _stale_only_in_a_buffered_run(self) -> Self:
        if self.mode == "synchronous" and self.max_staleness:
            raise ValueError(f"max_staleness = {self.max_staleness} in a synchronous run")
        return self

    @model_validator(mode="after")
    def _entry_fits_a_frame(self) -> Self:
        scalars = self.local_steps * self.perturbations
        if scalars > MAX_STEPS:
            raise ValueError(f"local_steps × perturbations = {scalars} exceeds {MAX_STEPS}")
        terms, most = self.directions * scalars * (self.max_staleness + 1), most_terms(aged=self.max_staleness > 0)
        if terms > most:
            product = "directions × local_steps × perturbations" + " × (max_staleness + 1)" * bool(self.max_staleness)
            raise ValueError(f"{product} = {terms} exceeds {most}")
        return self

    @property
    def run_id(self) -> bytes:
        """The 16 bytes that enter seeds and entry hashes."""
        return bytes.fromhex(self.run)

    @property
    def completion_fingerprint(self) -> bytes | None:
        """The 32 bytes of `completion`."""
        return None if self.completion is None else bytes.fromhex(self.completion)

    @property
    def mask_hash(self) -> bytes:
        """The 16 bytes of the mask hash."""
        return bytes.fromhex(self.mask)

    @property
    def mask_name(self) -> bytes:
        """The 16 bytes that name the mask's chunks."""
        return bytes.fromhex(self.mask_blob or self.mask)


class ServerState(ControlMessage):
    """Who serves; retained on `…/server`, with a will that says "lost".

    `server_id`: random u64, hex, one a process; the pair (term, server_id) orders servers.
    """

    status: Literal["online", "finished", "stopped", "lost"]
    run: RunId
    term: U32
    server_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    link: U32  # random, one a connection; a will counts only with the last birth's link
    host: Annotated[str, Field(max_length=255)]
    round: U32
    nodes: U32 = 0

    @property
    def rank(self) -> tuple[int, str]:
        """A server that sees a higher one ends."""
        return (self.term, self.server_id)

    @property
    def connected(self) -> bool:
        """Whether the server's connection `link` stands, as far as the broker knows."""
        return self.status in ("online", "finished")


class NodeStatus(ControlMessage):
    """Birth and death of a node; retained on `…/up/<id>/status`.

    `status`: "starting" is connected but not ready to step; "asleep" will come back (docs/duty-cycle.md); "lost" is
    the will. `refuses`: why a node that is connected takes no part, by its own policy or since it cannot.
    """

    sender: ClassVar[str] = "node"

    status: Literal["starting", "online", "asleep", "stopped", "lost"]
    boot: U32  # random u32, one a process
    link: U32  # random u32, one a connection
    host: Annotated[str, Field(max_length=255)]
    run: RunId | None = None
    rows: U32 = 0  # size of its data
    version: U32 = 0  # theta's version on this node when it said this
    digest: Hash | None = None  # of that theta, where one is due
    wakes_in_s: Annotated[int, Field(ge=1, le=7 * 86_400)] | None = None  # of "asleep": it is back by then
    refuses: Annotated[str, Field(min_length=1, max_length=MAX_REFUSES)] | None = None  # only of "starting"
    signal: Annotated[float, Field(ge=0, le=1e6)] | None = None  # signal to noise of its scalars, where it is too low

    @model_validator(mode="after")
    def _says_when_it_wakes(self) -> Self:
        if (self.status == "asleep") != (self.wakes_in_s is not None):
            raise ValueError('wakes_in_s belongs to "asleep", and only to it')
        if self.refuses is not None and self.status != "starting":
            raise ValueError('refuses belongs to "starting"')
        return self

    @property
    def in_words(self) -> str:
        """What it says, for people: the status, or why the node takes no part."""
        return self.status if self.refuses is None else f"{REFUSES}{self.refuses}"


ControlT = TypeVar("ControlT", bound=ControlMessage)


def decode_control(payload: bytes, kind: type[ControlT]) -> ControlT:
    """Decode a JSON control message.

    Raises:
        TooLarge: more than 64 KiB.
        UnknownKey: it has a key that this version does not know.
        BadValue: not JSON, or not this message; names the first field that is wrong.
    """
    if len(payload) > MAX_CONTROL_BYTES:
        raise TooLarge(kind.__name__, f"{len(payload)} bytes are more than {MAX_CONTROL_BYTES}")
    try:
        return kind.model_validate_json(payload, strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        wrong = error.errors(include_url=False)
        first = next((one for one in wrong if one["type"] == "extra_forbidden"), wrong[0])
        place = ".".join(str(part) for part in first["loc"] or first.get("ctx", {}).get("loc", ("JSON",)))[:100]
        where = f"{kind.__name__}.{ascii(place)[1:-1]}"
        if first["type"] == "extra_forbidden":
            problem = f"is a key that this release does not know: a newer {kind.sender} sent it"
            raise UnknownKey(where, problem, "update this program") from error
        raise BadValue(where, first["msg"].removeprefix("Value error, ")) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadValue(kind.__name__, f"is not JSON ({error})") from error
