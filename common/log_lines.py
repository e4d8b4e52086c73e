"""The lines that a component writes to stderr: plain ones for people, or a JSON object each for machines.

CHORD_LOG_FORMAT chooses. Where stderr leads to systemd's journal, a line begins with its priority (<6> is information),
which the journal takes off again and filters by.
"""

import json
import logging
import os
import sys
import time
from datetime import UTC, datetime
from enum import StrEnum

from common.errors import OperatorError

LOG_FORMAT = "CHORD_LOG_FORMAT"


class LogFormat(StrEnum):
    PLAIN = "plain"
    JSON = "json"


PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}
"""Syslog's, by the level of Python's logging."""


def log_format() -> LogFormat:
    """Raises OperatorError where the environment asks for one that there is not."""
    name = os.environ.get(LOG_FORMAT, LogFormat.PLAIN)
    if name not in tuple(LogFormat):
        raise OperatorError(f"{LOG_FORMAT}: got {name!r}, expected plain or json")
    return LogFormat(name)


class PlainLines(logging.Formatter):
    """Time, component, level, message."""

    def __init__(self, component: str) -> None:
        super().__init__(f"%(asctime)s {component} %(levelname)s %(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """What a peer sent must not look like a line of its own."""
        record.message = record.message.replace("\r", "\\r").replace("\n", "\\n")
        return super().formatMessage(record)


class JsonLines(logging.Formatter):
    """Objects of time, level, component and message, with a traceback where there is one."""

    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component

    def format(self, record: logging.LogRecord) -> str:
        values = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "component": self._component,
            "message": record.getMessage(),
        }
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False)


class JournalLines(logging.Formatter):
    """Another formatter's, with the journal's priority before them."""

    def __init__(self, lines: logging.Formatter) -> None:
        super().__init__()
        self._lines = lines

    def format(self, record: logging.LogRecord) -> str:
        return with_priority(record.levelno, self._lines.format(record))


def make_formatter(component: str) -> logging.Formatter:
    """As the environment asks for. Raises OperatorError."""
    lines = JsonLines(component) if log_format() is LogFormat.JSON else PlainLines(component)
    return JournalLines(lines) if _leads_to_journal() else lines


def last_line(command: str, text: str) -> str:
    """The line with which a command ends that cannot go on."""
    line = f"{command}: {text}"
    if os.environ.get(LOG_FORMAT) == LogFormat.JSON:
        values = {"msg": text, "levelname": "CRITICAL", "created": time.time()}
        line = JsonLines(command).format(logging.makeLogRecord(values))
    return with_priority(logging.CRITICAL, line) if _leads_to_journal() else line


def with_priority(level: int, line: str) -> str:
    return f"<{PRIORITIES.get(level, 6)}>{line}"


def _leads_to_journal() -> bool:
    try:
        stream = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"


def log_what_python_says() -> None:
    """Warnings, and an error that nothing caught, become lines like the others."""
    logging.captureWarnings(True)
    sys.excepthook = lambda kind, error, _: logging.getLogger().critical(
        "ended by %s: %s", kind.__name__, error, exc_info=error
    )
