"""Logging for whoever runs an app: nothing is configured on import."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import msgspec

from penstock.errors import ConfigError, near, printable

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
FORMATS = ("console", "json")

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (ISO 8601, UTC), `level`, `logger`, `message`, the record's extra
    fields, and `traceback` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update((key, value) for key, value in record.__dict__.items() if key not in _STANDARD)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        try:
            return msgspec.json.encode(line, enc_hook=str).decode()
        except (UnicodeError, TypeError, OverflowError):  # text or a field of an extra that JSON cannot say
            return msgspec.json.encode({name: printable(str(value)) for name, value in line.items()}).decode()


class ConsoleFormatter(logging.Formatter):
    """For people: time, level, logger, message. What a message or a traceback quotes can neither begin a line that
    looks like another record nor command a terminal: its further lines are indented, its control characters escaped."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        told = super().format(record)
        return told if told.isprintable() else "\n  ".join(map(_visible, told.split("\n")))


def _visible(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(one if one.isprintable() or one == "\t" else repr(one)[1:-1] for one in line)


def configure(level: str = "info", style: str = "console") -> None:
    """Log to stderr from now on.

    :raises ConfigError: an unknown level or format.
    """
    if level.lower() not in LEVELS:
        raise ConfigError(f"log level {level!r} is not one of {', '.join(LEVELS)}{near(level, LEVELS)}")
    if style not in FORMATS:
        raise ConfigError(f"log format {style!r} is not one of {', '.join(FORMATS)}{near(style, FORMATS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else ConsoleFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(LEVELS[level.lower()])
