"""The server's log on stderr, for people or as JSON, one line an event, and its words on stdout.

A thread writes each: neither a reader that stalls nor a full disk holds up the event loop. Lines
that could not be written are dropped, counted, and told of once writing works again.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from datetime import UTC, datetime

from structlog.dev import ConsoleRenderer, plain_traceback
from structlog.processors import JSONRenderer, format_exc_info
from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_log_level, add_logger_name
from structlog.typing import EventDict, Processor

from zllm.service.config import ServerConfig

MAX_WAITING = 10_000
"""Lines between the event loop and the thread; more are dropped."""
LAST_LINES_S = 1.0
"""How long the last lines get to leave."""

log = logging.getLogger(__name__)


class Logs:
    """What `zllm` logs at the config's level, and the warnings of its libraries, from entry to
    exit."""

    def __init__(self, config: ServerConfig, descriptor: int = 2) -> None:
        self._level = config.log_level.upper()
        self._writer = _Writer(descriptor, _formatter(config, descriptor))
        self._before: Callable[[], None] = lambda: None

    def __enter__(self) -> Logs:
        root, ours = logging.getLogger(), logging.getLogger("zllm")
        handlers, levels = root.handlers[:], (root.level, ours.level)

        def restore() -> None:
            root.handlers[:] = handlers
            root.setLevel(levels[0])
            ours.setLevel(levels[1])

        self._before = restore
        root.handlers[:] = [self._writer]
        root.setLevel(logging.WARNING)
        ours.setLevel(self._level)
        self._writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._before()
        self._writer.stop()


class Words:
    """What the server says on stdout, from entry to exit, likewise in a thread's own time."""

    def __init__(self, descriptor: int = 1) -> None:
        self._writer = _Writer(descriptor, logging.Formatter("%(message)s"))

    def __enter__(self) -> Callable[[str], None]:
        self._writer.start()
        return lambda line: self._writer.emit(logging.makeLogRecord({"msg": line}))

    def __exit__(self, *_: object) -> None:
        self._writer.stop()


class _Writer(logging.Handler):
    def __init__(self, descriptor: int, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._descriptor = descriptor
        self._waiting: queue.Queue[logging.LogRecord | None] = queue.Queue(MAX_WAITING)
        self._lost = 0
        self._cut = False
        """The last line broke off: the next one is not to continue it."""
        self._thread = threading.Thread(target=self._write_all, daemon=True, name="log")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        try:
            self._waiting.put(None, timeout=LAST_LINES_S)
        except queue.Full:
            return  # nobody reads: the thread ends with the process
        self._thread.join(LAST_LINES_S)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._lost += 1

    def _write_all(self) -> None:
        while (record := self._waiting.get()) is not None:
            lost, self._lost = self._lost, 0
            if lost and not self._write(_told(lost)):
                self._lost += lost
            if not self._write(record):
                self._lost += 1

    def _write(self, record: logging.LogRecord) -> bool:
        try:
            line = f"{self.format(record)}\n".encode(errors="backslashreplace")
            line = b"\n" + line if self._cut else line
            while line:
                line = line[os.write(self._descriptor, line) :]
                self._cut = bool(line)
        except Exception:  # no record, be it one that does not format, may end the thread
            return False
        return True


def _told(lost: int) -> logging.LogRecord:
    return log.makeRecord(
        log.name, logging.WARNING, __file__, 0, "%d log lines were lost", (lost,), None
    )


def _formatter(config: ServerConfig, descriptor: int) -> logging.Formatter:
    """Fields of a record's `extra` become fields of the line. Tracebacks are plain: with the local
    variables that structlog would add, they would hold prompts."""
    if config.log_format == "json":
        renderers: list[Processor] = [format_exc_info, JSONRenderer()]
    else:
        colors = os.isatty(descriptor)
        renderers = [
            _escape,
            ConsoleRenderer(
                colors=colors,
                pad_event_to=0,
                pad_level=False,
                exception_formatter=plain_traceback,
            ),
        ]
    return ProcessorFormatter(
        foreign_pre_chain=[_timestamp, add_log_level, add_logger_name, ExtraAdder()],
        processors=[ProcessorFormatter.remove_processors_meta, *renderers],
    )


def _timestamp(_: object, __: str, event: EventDict) -> EventDict:
    """When it was logged, which is before it is written."""
    logged = datetime.fromtimestamp(event["_record"].created, UTC)
    event["timestamp"] = logged.isoformat(timespec="milliseconds")
    return event


_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}


def _escape(_: object, __: str, event: EventDict) -> EventDict:
    """What clients sent, such as ids, must neither end a line nor steer a terminal."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = value.translate(_CONTROL)
    return event
