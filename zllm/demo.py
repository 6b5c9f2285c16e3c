"""`zllm demo`: a real server, a real client, the embedded model, and answers that are checked."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from zllm.clients.client import Client
from zllm.errors import ConfigError

START_S = 120.0
LISTENING = "listening on "

QUESTIONS = (
    ("What is 12 + 7?", "12 + 7 = 19"),
    ("What is 81 - 36?", "81 - 36 = 45"),
    ("Count from 1 to 12.", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12"),
    ('Reverse the word "stream".', "maerts"),
    ('Write "token" in upper case.', "TOKEN"),
    ("What day comes after Tuesday?", "Wednesday"),
    ("Write JSON: name Ada, age 36, city Paris", '{"name": "Ada", "age": 36, "city": "Paris"}'),
)


def main() -> int:
    """0 when every answer is right, 1 when one is wrong."""
    console = Console(highlight=False)
    with running_server(console) as target, Client(target) as client:
        client.wait_ready(START_S)
        wrong = sum(not _ask(console, client, *question) for question in QUESTIONS)
    if wrong:
        console.print(f"[red]{wrong} of {len(QUESTIONS)} answers are wrong")
        return 1
    console.print(f"[green]all {len(QUESTIONS)} answers are right")
    return 0


def _ask(console: Console, client: Client, question: str, expected: str) -> bool:
    console.print(f"[bold]> {question}")
    stream = client.chat(question, temperature=0.0, max_tokens=96)
    answer, started = "", time.monotonic()
    for delta in stream:
        answer += delta.text
        console.print(delta.text, end="", markup=False)
    right = answer.strip() == expected
    tokens = stream.usage.completion_tokens if stream.usage else 0
    rate = tokens / max(time.monotonic() - started, 1e-9)
    verdict = "[green]right[/]" if right else f"[red]wrong[/]: it should be {escape(expected)}"
    console.print(f"\n  {verdict} [dim]({tokens} tokens, {rate:.0f} a second)")
    return right


@contextmanager
def running_server(console: Console) -> Iterator[str]:
    """`zllm serve` on free ports, as its own process; gives its address and stops it after."""
    ports = ["--port", "0", "--admin-port", "0", "--metrics-port", "0"]
    command = [sys.executable, "-m", "zllm", "serve", *ports]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=(server, lines), daemon=True).start()
    try:
        yield _await_listening(console, lines)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()


def _read_lines(server: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
    if server.stdout is not None:
        for line in server.stdout:
            lines.put(line.rstrip("\n"))
    lines.put("")


def _await_listening(console: Console, lines: queue.SimpleQueue[str]) -> str:
    deadline = time.monotonic() + START_S
    while True:
        try:
            line = lines.get(timeout=max(deadline - time.monotonic(), 0.0))
        except queue.Empty:
            raise TimeoutError(f"the server did not start within {START_S:g} s") from None
        if not line:
            raise ConfigError("the server ended before it listened; its output above says why")
        console.print(f"[dim]{line}")
        if line.startswith(LISTENING):
            return line.removeprefix(LISTENING)
