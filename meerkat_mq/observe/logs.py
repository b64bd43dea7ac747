"""structlog set up once a process: console lines for people, JSON for machines."""

import logging
import sys
from enum import StrEnum
from typing import TextIO

import structlog


class LogLevel(StrEnum):
    """Least level to log."""

    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


def configure_logs(*, as_json: bool | None = None, level: str = "INFO", file: TextIO | None = None) -> None:
    """Set up logging.

    Args:
        as_json: JSON lines, or console lines; default: console on a terminal, JSON elsewhere.
        level: DEBUG, INFO, WARNING or ERROR.
        file: where to; standard error by default.
    """
    file = file or sys.stderr
    if as_json is None:
        as_json = not file.isatty()
    renderer: structlog.types.Processor
    renderer = structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=structlog.PrintLoggerFactory(file),
    )
