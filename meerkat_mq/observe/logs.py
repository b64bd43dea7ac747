"""structlog set up once a process: console lines for people, JSON for machines.

A log line that cannot be written is dropped; the next one that can be says how many were.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TextIO

import structlog
import typer

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
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(),
    ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=structlog.WriteLoggerFactory(stream),
    )
    if isinstance(raw := getattr(stream, "buffer", None), Diagnostics):
        raw.notice = lambda count: _line(processors, event="log lines dropped", lines=count)


def _line(processors: Sequence[structlog.types.Processor], **event: object) -> str:
    """A log line as the processors word it."""
    made: Any = event
    for processor in processors:
        made = processor(None, "warning", made)
    return f"{made}\n"
