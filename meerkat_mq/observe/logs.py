"""structlog set up once a process: console lines for people, JSON for machines.

A log line that cannot be written is dropped; the next one that can be says how many were.
"""

import logging
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Annotated, Any, Literal, TextIO

import structlog
import typer

from meerkat_mq.errors import printable, printable_lines, without_credentials
from meerkat_mq.observe.streams import Diagnostics, lossy

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
JsonLogs = Annotated[bool | None, typer.Option(help="Log JSON lines; default: unless on a terminal.")]
LeastLevel = Annotated[LogLevel, typer.Option(help="Least level to log.", case_sensitive=False)]


def configure_logs(*, as_json: bool | None = None, level: LogLevel = "INFO", file: TextIO | None = None) -> None:
    """Set up logging.

    Args:
        as_json: JSON lines, or console lines; default: console on a terminal, JSON elsewhere.
        level: least level to log.
        file: where to; standard error by default.
    """
    stream = lossy(file or sys.stderr)
    if as_json is None:
        as_json = not stream.isatty()
    processors: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _hide_credentials,
        *([structlog.processors.JSONRenderer()] if as_json else [_printable, structlog.dev.ConsoleRenderer()]),
    ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=structlog.WriteLoggerFactory(stream),
    )
    if isinstance(raw := getattr(stream, "buffer", None), Diagnostics):
        raw.notice = lambda count: _line(processors, event="log lines dropped", lines=count)


def _printable(_: object, __: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """Nothing of what a line tells steers the terminal; JSON lines escape it by themselves."""
    words = {"exception": printable_lines}  # the one with several lines
    return {
        printable(key): words.get(key, printable)(value) if isinstance(value, str) else value
        for key, value in event.items()
    }


def _line(processors: Sequence[structlog.types.Processor], **event: object) -> str:
    """A log line as the processors word it."""
    made: Any = event
    for processor in processors:
        made = processor(None, "warning", made)
    return f"{made}\n"


def _hide_credentials(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """No line holds the password of a URL, whoever wrote it: a library's error may quote one."""
    return {key: _without(value) for key, value in event.items()}


def _without(value: object) -> object:
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, list | tuple):
        return [_without(one) for one in value]
    return {key: _without(one) for key, one in value.items()} if isinstance(value, dict) else value
