"""The control plane: JSON that people debug with `mosquitto_sub`."""

import json
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from meerkat_mq.config import EngineName
from meerkat_mq.errors import BadValue, TooLarge
from meerkat_mq.wire.frames import MAX_LANES, MAX_STALENESS, MAX_STEPS, most_terms

MAX_CONTROL_BYTES = 64 * 1024
MAX_RUN_WEIGHTS = 2**26

Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
# How a mask is compressed and where a model lies may change within a run: hashes say what they are.
MAY_CHANGE = frozenset({"mask_blob", "mask_bytes", "mask_chunks", "model", "max_step"})

U32 = Annotated[int, Field(ge=0, lt=2**32)]
RunId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ControlMessage(BaseModel):
    """Base of all JSON messages: frozen, closed, bounded."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def encode(self) -> bytes:
        """Compact JSON, UTF-8."""
        return self.model_dump_json(exclude_none=True).encode()


class TaskDescription(ControlMessage):
    """A run's task, as `tasks` wrote it and reads it: to the wire, JSON with a name.

    Attributes:
        name: for people.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    name: Annotated[str, Field(min_length=1, max_length=64)]


class RunDescriptor(ControlMessage):
    """All that a node must know of a run besides its own data and base model; retained on `…/run`.

    Attributes:
        run: 16 random bytes, hex.
        engine: "transformers", "toy" for tests and drills, or "package.module:factory" (docs/engines.md).
        model: name of the base model, for people.
        weights: n, the number of masked weights.
        mask: mask hash.
        mask_bytes: size of the encoded mask blob, in `mask_chunks` chunks.
        mask_blob: hash of the encoded mask blob, where its chunks have that name; None: they have the mask hash.
        local_steps: T.
        directions: P, the lanes of a round.
        perturbations: projected gradients a local step.
        mode: whether rounds wait for their nodes, or take what comes (docs/buffered.md).
        max_staleness: how many versions old an update's theta may be; 0 in a synchronous run.
        values: whether nodes may send displacements (docs/values.md).
        max_step: no coefficient of an entry is larger in magnitude; None: 2⁶⁴.
    """

    protocol: Literal[1] = 1
    federation: Identifier
    run: RunId
    engine: EngineName
    model: str
    task: TaskDescription | None = None
    dtype: Literal["float32", "bfloat16", "float16"]
    fingerprint: Fingerprint
    tokenizer: Fingerprint
    mask: Hash
    mask_bytes: U32
    mask_chunks: Annotated[int, Field(ge=1, le=65536)]
    weights: Annotated[int, Field(ge=1, le=MAX_RUN_WEIGHTS)]
    stream: Literal["mk1", "rademacher"]
    rounds: Annotated[int, Field(ge=1, lt=2**32)]
    local_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    directions: Annotated[int, Field(ge=1, le=MAX_LANES)]
    lr: Annotated[float, Field(gt=0)]
    eps: Annotated[float, Field(gt=0)]
    perturbations: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 1
    batch_size: Annotated[int, Field(ge=1, le=65536)]
    digest_every: Annotated[int, Field(ge=1)]
    mode: Literal["synchronous", "buffered"] = "synchronous"
    max_staleness: Annotated[int, Field(ge=0, le=MAX_STALENESS)] = 0
    values: bool = False
    max_step: Annotated[float, Field(gt=0, le=2.0**64)] | None = None
    mask_blob: Hash | None = None

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
    def mask_hash(self) -> bytes:
        """The 16 bytes of the mask hash."""
        return bytes.fromhex(self.mask)

    @property
    def mask_name(self) -> bytes:
        """The 16 bytes that name the mask's chunks."""
        return bytes.fromhex(self.mask_blob or self.mask)


class ServerState(ControlMessage):
    """Who serves; retained on `…/server`, with a will that says "lost".

    Attributes:
        link: random, one a connection; a will counts only with the last birth's link.
        server_id: random u64, hex, one a process; the pair (term, server_id) orders servers.
    """

    status: Literal["online", "finished", "stopped", "lost"]
    run: RunId
    term: U32
    server_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    link: U32
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

    Attributes:
        status: "starting" is connected but not ready to step; "asleep" will come back (docs/duty-cycle.md); "lost" is
            the will.
        boot: random u32, one a process.
        link: random u32, one a connection.
        rows: size of its data.
        version: theta's version on this node when it said this.
        digest: of that theta, where one is due.
        wakes_in_s: of "asleep", seconds until it comes back at the latest.
    """

    status: Literal["starting", "online", "asleep", "stopped", "lost"]
    boot: U32
    link: U32
    host: Annotated[str, Field(max_length=255)]
    run: RunId | None = None
    rows: U32 = 0
    version: U32 = 0
    digest: Hash | None = None
    wakes_in_s: Annotated[int, Field(ge=1, le=7 * 86_400)] | None = None

    @model_validator(mode="after")
    def _says_when_it_wakes(self) -> Self:
        if (self.status == "asleep") != (self.wakes_in_s is not None):
            raise ValueError('wakes_in_s belongs to "asleep", and only to it')
        return self


ControlT = TypeVar("ControlT", bound=ControlMessage)


def decode_control(payload: bytes, kind: type[ControlT]) -> ControlT:
    """Decode a JSON control message.

    Raises:
        TooLarge: more than 64 KiB.
        BadValue: not JSON, or not this message; names the first field that is wrong.
    """
    if len(payload) > MAX_CONTROL_BYTES:
        raise TooLarge(kind.__name__, f"{len(payload)} bytes are more than {MAX_CONTROL_BYTES}")
    try:
        return kind.model_validate_json(payload, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:100] or "JSON"
        raise BadValue(f"{kind.__name__}.{ascii(place)[1:-1]}", first["msg"]) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadValue(kind.__name__, f"is not JSON ({error})") from error
