"""The one error tree. Every error names where, what is wrong, and the remedy; each branch has its own exit code.

MeerkatError                     1
├── ConfigError                  2   a TOML file, a key in it, a command-line value
├── DataError                    3   a data file, a line of it, a label
├── TaskError                    3   a task name or task file
├── ModelError                   4   a model folder, its tokenizer, its weights
│   ├── ModelNotFound
│   ├── ModelMismatch                another checkpoint, tokenizer or mask than the run's
│   └── UnsupportedModel
├── MaskError                    4   a mask file or a mask request
├── MissingExtra                 4   an optional package, such as PyTorch, that is not installed
├── BrokerError                  5   the broker and the way to it
│   ├── BadCredentials
│   ├── PayloadTooLarge
│   └── NotConnected
├── RunError                     6   the run that server and nodes share
│   ├── AnotherServer                another server is online, or fenced this one
│   ├── NodeReplaced                 another process connected with this node's id
│   ├── TooFewNodes
│   ├── RunMismatch                  ledger, digest or settings do not fit the run
│   ├── PolicyRefused                a run asks for what this node's [policy] does not allow
│   │   └── SpentToday                  what it allows of a day is used up
│   ├── NotFinite                    a loss, or weights, left what a float can hold
│   ├── LedgerError                  the ledger's file or folder cannot be used
│   │   └── LedgerUnavailable            not now: its disk is full, or another process writes it
│   │       └── LedgerFailing                its disk cannot be read or written
│   └── DrillFailed                  a fault drill or simulation ended with a violation
└── WireError                    7   bytes from the broker that do not decode
    ├── Truncated
    ├── BadMagic
    ├── UnknownVersion
    ├── UnknownType
    ├── UnknownFlags
    ├── BadChecksum
    ├── BadValue
    │   └── UnknownKey               a newer release sent it
    └── TooLarge
"""

import re
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, ClassVar

VALUE_SHOWN = 60  # characters of a value, in an error
LONGEST_INTEGER = 4096  # bits
NAMES_SHOWN = 20
REASON_SHOWN = 300
_CREDENTIALS = re.compile(r"(:/{1,2})\S*(?:@|%40)")  # a path has one slash


def without_credentials(text: str) -> str:
    """Text in which no URL holds a user and a password: errors and logs are read by more people than a configuration.

    Until the next white space: a value that is known to be one URL is for `config.load`.
    """
    return _CREDENTIALS.sub(r"\1***@", text)


def printable(text: str) -> str:
    """Text without anything that could steer a terminal, or break a page or a line."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def printable_lines(text: str) -> str:
    """The same, of text that may have several lines."""
    return "\n".join(map(printable, text.split("\n")))


def cut(text: str, most: int = VALUE_SHOWN) -> str:
    """A name or a message for an error, cut short."""
    text = without_credentials(text)  # first: half a URL would not be known as one
    return text if len(text) <= most else f"{text[:most]}…"


class _Short(reprlib.Repr):
    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(without_credentials(x), level)

    def repr_int(self, x: int, level: int) -> str:
        long = x.bit_length() > LONGEST_INTEGER  # Python refuses to write thousands of digits; TOML's 0x… may have them
        return f"an integer of {x.bit_length()} bits" if long else super().repr_int(x, level)


def shown(value: Any) -> str:
    """A value for an error, cut short, however long or deep it is."""
    short = _Short()
    short.maxstring = short.maxother = short.maxlong = VALUE_SHOWN
    return short.repr(value)


def shown_names(names: Sequence[object], nothing: str) -> str:
    """Some names for an error: in quotes where they could be misread, cut short, and no more than twenty."""
    texts = [text if re.fullmatch(r"\w{1,60}", text := str(name)) else shown(text) for name in names[:NAMES_SHOWN]]
    return ", ".join([*texts, *(["…"] if len(names) > NAMES_SHOWN else [])]) or nothing


def reason(error: BaseException) -> str:
    """What an error that is none of ours says, in one short line."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not said:
        return type(error).__name__
    line = " ".join(said[:2]) if said[0].endswith(":") else said[0]
    words = f"{type(error).__name__}: {line}" if isinstance(error, KeyError | AttributeError | AssertionError) else line
    return printable(cut(words, REASON_SHOWN))


class Fate(StrEnum):
    """What a service makes of an error: docs/errors.md says it class by class."""

    FINAL = "final"
    AGAIN = "tried again"
    DROPPED = "dropped and counted"


class MeerkatError(Exception):
    """Base of all errors that users meet: one line.

    Args:
        where: the file, key, topic or field concerned.
        problem: what is wrong, with the value found.
        remedy: what to do about it.
    """

    exit_code: ClassVar[int] = 1
    fate: ClassVar[Fate] = Fate.FINAL

    def __init__(self, where: str, problem: str, remedy: str = "") -> None:
        self.where, self.problem, self.remedy = (
            printable(without_credentials(text)) for text in (where, problem, remedy)
        )
        super().__init__(f"{self.where}: {self.problem}" + (f"; {self.remedy}" if remedy else ""))

    def __reduce__(self) -> tuple[type["MeerkatError"], tuple[str, str, str]]:
        return type(self), (self.where, self.problem, self.remedy)


@contextmanager
def within(place: str) -> Iterator[None]:
    """Put a wider place before where an error is: a file before its key, a key before its value."""
    try:
        yield
    except MeerkatError as error:
        raise type(error)(f"{place}: {error.where}", error.problem, error.remedy) from error


class ConfigError(MeerkatError):
    """A configuration file, key or command-line value is wrong."""

    exit_code = 2


class DataError(MeerkatError):
    """A data file cannot be used."""

    exit_code = 3


class TaskError(MeerkatError):
    """A task is unknown or its description is wrong."""

    exit_code = 3


class ModelError(MeerkatError):
    """A model cannot be used."""

    exit_code = 4


class ModelNotFound(ModelError):
    """There is no model at the given folder or hub id."""


class ModelMismatch(ModelError):
    """The model, tokenizer or masked weights differ from the run's."""


class UnsupportedModel(ModelError):
    """The architecture has parts that the method does not cover."""


class MaskError(MeerkatError):
    """A mask cannot be made, read or used."""

    exit_code = 4


class MissingExtra(MeerkatError):
    """An optional package that is not installed, is too old, or is damaged."""

    exit_code = 4


class BrokerError(MeerkatError):
    """The broker, or the way to it, fails."""

    exit_code = 5
    fate = Fate.AGAIN


class BadCredentials(BrokerError):
    """The broker refuses the user name, password or certificate."""


class PayloadTooLarge(BrokerError):
    """A message is larger than the configured packet limit; raised before sending."""

    fate = Fate.DROPPED


class NotConnected(BrokerError):
    """A message could not be sent before its deadline."""

    fate = Fate.DROPPED


class RunError(MeerkatError):
    """The run shared by server and nodes cannot go on here."""

    exit_code = 6


class AnotherServer(RunError):
    """Another server is online in this federation, or has fenced this one."""

    fate = Fate.AGAIN


class NodeReplaced(RunError):
    """Another process took this node's id."""

    fate = Fate.AGAIN


class TooFewNodes(RunError):
    """Not enough nodes came in time."""


class RunMismatch(RunError):
    """The ledger, the digests or the settings do not fit the run."""


class PolicyRefused(RunError):
    """A run asks for what the policy of this node does not allow; the node stays, and looks at the next run."""

    fate = Fate.AGAIN


class SpentToday(PolicyRefused):
    """What the policy of this node allows of a day is used up; the node tries again until the next day."""


class NotFinite(RunError):
    """A loss, or weights, left what a float can hold."""


class LedgerError(RunError):
    """The ledger's file or folder cannot be used; the file is left as it was."""


class LedgerUnavailable(LedgerError):
    """The ledger cannot be read or written just now; what was tried left no trace, and a server tries it again."""

    fate = Fate.AGAIN


class LedgerFailing(LedgerUnavailable):
    """The ledger's disk gives errors; a server that meets them for long ends, for its supervisor to start it again."""


class DrillFailed(RunError):
    """A fault drill or a simulation found something that does not hold."""


class WireError(MeerkatError):
    """Bytes that do not decode; the receiver counts and drops them."""

    exit_code = 7
    fate = Fate.DROPPED


class Truncated(WireError):
    """Fewer or more bytes than the frame says."""


class BadMagic(WireError):
    """Not a frame of this protocol."""


class UnknownVersion(WireError):
    """A frame of another protocol version."""


class UnknownType(WireError):
    """A frame type, codec or kind that this version does not know."""


class UnknownFlags(WireError):
    """Flag bits that this version does not know."""


class BadChecksum(WireError):
    """The checksum does not match the bytes."""


class BadValue(WireError):
    """A field is outside its range, not finite, or not canonical."""


class UnknownKey(BadValue):
    """A key of a JSON message that this version does not know: its sender is of a newer one."""


class TooLarge(WireError):
    """A declared or actual size is over its limit."""
