"""How the log is written: JSON or for people, and never in the way of the server."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest

from tests.service.test_processes import SERVE, ask
from zllm.clients.client import Client
from zllm.service.config import ServerConfig
from zllm.service.logs import MAX_WAITING, Logs, Words

log = logging.getLogger("zllm.tests")
FULL = "/dev/full"


@contextmanager
def logging_to(path: str | Path, **settings: str) -> Iterator[None]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        with Logs(ServerConfig(**settings), descriptor):
            yield
    finally:
        os.close(descriptor)


def test_a_json_line_has_time_level_logger_event_and_fields(tmp_path: Path) -> None:
    before = time.time()
    with logging_to(tmp_path / "log", log_format="json"):
        log.info("request %d", 3, extra={"tenant": "acme\n", "queue_time": 0.25})
        try:
            secret = "swordfish"
            raise ValueError(len(secret))
        except ValueError:
            log.exception("unforeseen")
    first, second = map(json.loads, (tmp_path / "log").read_text().splitlines())
    logged = datetime.fromisoformat(first.pop("timestamp")).timestamp()
    assert before - 1 <= logged <= time.time()
    assert first == {
        "level": "info",
        "logger": "zllm.tests",
        "event": "request 3",
        "tenant": "acme\n",
        "queue_time": 0.25,
    }
    assert (second["level"], second["event"]) == ("error", "unforeseen")
    assert "ValueError: 9" in second["exception"]


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_traceback_shows_no_variables(tmp_path: Path, log_format: str) -> None:
    def fail(prompt: str) -> None:
        raise ValueError("it broke")

    with logging_to(tmp_path / "log", log_format=log_format):
        try:
            fail(" ".join(["sword", "fish"]))
        except ValueError:
            log.exception("unforeseen")
    text = (tmp_path / "log").read_text()
    assert "it broke" in text
    assert "sword fish" not in text


def test_on_the_console_what_a_client_sent_neither_ends_a_line_nor_steers_the_terminal(
    tmp_path: Path,
) -> None:
    with logging_to(tmp_path / "log"):
        log.info("request", extra={"request_id": "a\nfake line \x1b[2J", "model": "m\r\x9b1A"})
    text = (tmp_path / "log").read_text()
    assert text.count("\n") == 1
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in text[:-1])
    assert "fake line" in text


@pytest.mark.parametrize(
    ("level", "told"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)]
)
def test_the_level_is_kept(tmp_path: Path, level: str, told: int) -> None:
    with logging_to(tmp_path / "log", log_level=level):
        for name in ("debug", "info", "warning", "error"):
            getattr(log, name)("line")
        logging.getLogger("others").info("of no interest")
    assert (tmp_path / "log").read_text().count("line") == told
    assert "others" not in (tmp_path / "log").read_text()


def test_logging_is_afterwards_as_it_was(tmp_path: Path) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.getLogger("zllm").level
    with logging_to(tmp_path / "log"):
        assert root.handlers != before[0]
    assert (root.handlers, root.level, logging.getLogger("zllm").level) == before


@pytest.mark.skipif(not os.path.exists(FULL), reason=f"no {FULL} here")
def test_a_full_disk_loses_lines_and_nothing_else() -> None:
    with logging_to(FULL):
        for number in range(100):
            log.info("line %d", number)


def test_a_closed_descriptor_loses_lines_and_nothing_else(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    with Logs(ServerConfig(), descriptor):
        os.close(descriptor)
        for number in range(100):
            log.info("line %d", number)


def test_a_line_that_a_full_disk_cut_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 100

    def write_what_fits(descriptor: int, data: bytes) -> int:
        nonlocal room
        written = plain_write(descriptor, data[:room]) if room else 0
        room -= written
        if not written:
            room = 1000  # somebody makes room
            raise OSError(errno.ENOSPC, "no space left on device")
        return written

    plain_write = os.write
    monkeypatch.setattr(os, "write", write_what_fits)
    file = tmp_path / "log"
    with logging_to(file, log_format="json"):
        log.info("first")
        log.info("second")
    cut, *rest = file.read_text().splitlines()
    assert len(cut) == 100
    assert [json.loads(line)["event"] for line in rest] == ["1 log lines were lost", "second"]


def test_a_record_that_does_not_format_is_lost_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "log"
    with file.open("wb") as stream, Logs(ServerConfig(), stream.fileno()):
        log.warning("%d", "no number")
        log.warning("the next one")
    text = file.read_text()
    assert "the next one" in text
    assert "1 log lines were lost" in text


def test_a_reader_that_stalls_holds_nobody_up_and_is_told_what_it_missed() -> None:
    """The writer's thread alone waits for it, with a bounded number of lines."""
    reading, writing = os.pipe()
    count = 2 * MAX_WAITING
    with Logs(ServerConfig(log_format="json"), writing):
        for number in range(count):
            log.info("line", extra={"number": number})
        lines = read_until(reading, b"last words", lambda: log.info("last words"))
    os.close(reading)
    os.close(writing)
    events = [json.loads(line)["event"] for line in lines]
    kept = events.count("line")
    assert 0 < kept < count
    # Once, or a second time where the writer's thread began when lines had been lost already.
    told = [int(e.split()[0]) for e in events if e.endswith("log lines were lost")]
    assert sum(told) == count - kept


def test_words_that_nobody_reads_hold_nobody_up() -> None:
    reading, writing = os.pipe()
    began = time.monotonic()
    with Words(writing) as say:
        for _ in range(2000):
            say("x" * 100)
    assert time.monotonic() - began < 10
    assert os.read(reading, 101) == b"x" * 100 + b"\n"
    os.close(reading)
    os.close(writing)


def read_until(descriptor: int, last: bytes, say_last: Callable[[], None]) -> list[bytes]:
    data = b""
    said = False
    while last not in data:
        data += os.read(descriptor, 65536)
        if not said and data.count(b"\n") > MAX_WAITING // 2:
            said = True
            say_last()
    return data.splitlines()


def test_a_server_logs_as_its_flags_say_and_nothing_of_prompts(tmp_path: Path) -> None:
    errors = tmp_path / "stderr"
    with open(errors, "wb") as stderr:
        process = subprocess.Popen(
            [*SERVE, "--log-format", "json", "--stats-interval", "0.2"],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        try:
            assert process.stdout is not None
            target = next(
                line.split()[-1] for line in process.stdout if line.startswith("listening on ")
            )
            assert ask(target, "What is 12 + 7?") == "12 + 7 = 19"
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    text = errors.read_text()
    (request,) = [line for line in map(json.loads, text.splitlines()) if line["event"] == "request"]
    assert (request["model"], request["code"], request["finish_reason"]) == ("tiny", "OK", "eos")
    assert "12 + 7" not in text


def test_a_server_whose_stderr_nobody_reads_serves_on() -> None:
    process = subprocess.Popen(
        [*SERVE, "--log-level", "debug"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        target = next(
            line.split()[-1] for line in process.stdout if line.startswith("listening on ")
        )
        with Client(target, attempts=1) as client:
            # More lines than a pipe holds.
            for _ in range(600):
                client.generate("12 + 7 =", max_tokens=1, timeout=20)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
