"""What a run's report says beyond its ledger: `facts.json` in the state_dir, left by who knows it, such as the demo."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meerkat_mq.core.files import write_atomically
from meerkat_mq.errors import ConfigError
from meerkat_mq.wire.descriptor import RunDescriptor

FACTS_FILE = "facts.json"
Count = Annotated[int, Field(ge=0)]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class NodeFacts(_Facts):
    """Of a node; as in `report.NodeReport`."""

    labels: tuple[Count, ...] = ()
    payload_bytes: Count | None = None
    packet_bytes: Count | None = None
    sent_bytes: Count | None = None
    received_bytes: Count | None = None
    peak_rss_mib: Annotated[float, Field(ge=0)] | None = None
    digest: str = ""


class Facts(_Facts):
    """Of a run; as in `report.Report`.

    Attributes:
        mask: hash of the run's mask, hex: what says before its start which run they are of.
        run: its id, hex; "" before its start.
    """

    mask: str = ""
    run: str = ""
    model: str = ""
    parameters: Count | None = None
    covered: Count | None = None
    classes: tuple[str, ...] = ()
    bound: float | None = None
    digest: str = ""
    seconds: Annotated[float, Field(ge=0)] | None = None
    counts: dict[str, Count] = Field(default_factory=dict)
    nodes: dict[str, NodeFacts] = Field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write them into a state_dir, atomically.

        Raises:
            OSError: the folder is missing, read-only or full.
        """
        write_atomically(folder / FACTS_FILE, self.model_dump_json(indent=1).encode(), durable=False)


def facts_of(folder: Path, run: RunDescriptor) -> Facts:
    """The facts of a run; none where there is no such file, or it is of another run.

    Raises:
        ConfigError: the file cannot be used.
    """
    file = folder / FACTS_FILE
    try:
        facts = Facts.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return Facts()
    except OSError as error:
        raise ConfigError(
            str(file), f"cannot be read ({error.strerror})", "let this user read it, or remove it"
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "JSON"
        remedy = "remove it: the report then says what the ledger knows"
        raise ConfigError(f"{file}: {place}", str(first["msg"]), remedy) from error
    return facts if facts.mask == run.mask and facts.run in ("", run.run) else Facts()
