"""What tasks of all kinds share: the keys of a file become a task, and a task becomes JSON for the run descriptor."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from meerkat_mq.config import check_config
from meerkat_mq.core.step import Row
from meerkat_mq.errors import TaskError
from meerkat_mq.tasks.task import Continuation, Cut
from meerkat_mq.wire.descriptor import TaskDescription

MOST_BYTES = 32 * 1024  # of a task, half of what a control message may have

Name = Annotated[str, Field(min_length=1, max_length=64)]
MaxTokens = Annotated[int, Field(ge=8, le=8192)]


class TaskTable(BaseModel):
    """Base of the kinds. Their keys are fields, in the order in which they travel."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: ClassVar[str]

    @model_serializer(mode="wrap")
    def _without_none(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A key that is None is left out: nodes and files of an older release know nothing of it."""
        return {key: value for key, value in dump(self).items() if value is not None}

    @classmethod
    def from_table(cls, table: dict[str, Any], stem: str, where: str) -> Self:
        """A task from a file's table; its name is the file's, if it gives none.

        Raises:
            ConfigError, TaskError: a key is wrong; names it.
        """
        task = check_config({"name": stem} | cls.defaults(table) | table, cls, where=where)
        task.check(where)
        size = len(task.describe().encode())
        if size > MOST_BYTES:
            problem = f"takes {size:,} bytes, more than {MOST_BYTES:,}"
            raise TaskError(where, problem, "shorten what its keys hold: it is sent to every node")
        return task

    @classmethod
    def defaults(cls, table: dict[str, Any]) -> dict[str, Any]:
        """Keys that follow from others of a file's table."""
        return {}

    def check(self, where: str) -> None:
        """Refuse, by `TaskError`, what a schema cannot say."""

    def describe(self) -> TaskDescription:
        """The task as it travels in the run descriptor."""
        return TaskDescription.model_validate({"kind": self.kind} | self.model_dump(mode="json"))

    def with_limit(self, max_tokens: int) -> Self:
        """The same task with other `max_tokens`."""
        return self.model_copy(update={"max_tokens": max_tokens})

    @property
    def continuation(self) -> Continuation | None:
        """None: its candidates are chosen from."""
        return None

    def windows(self, row: Row, cut: Cut) -> Sequence[Row]:
        """The row itself."""
        return [row]


class OwnCandidates(TaskTable):
    """Base of the kinds whose rows bring their own candidates; they have no classes, and no encoder can do them."""

    classes: ClassVar[tuple[str, ...]] = ()
    candidates: ClassVar[tuple[str, ...]] = ()
    descriptions: ClassVar[tuple[str, ...]] = ()
    scale: ClassVar[float] = 1.0

    def class_of(self, row: Row) -> int:
        """0."""
        return 0
