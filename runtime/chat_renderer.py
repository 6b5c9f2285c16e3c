"""The program that renders chat templates, in a process of its own.

A template comes with the model and may loop for ever or build a string of gigabytes, in ways that
no check inside the interpreter can stop. Here the kernel stops it: SIGALRM ends the process at the
deadline, and memory has a limit. `chat_template.py` is the other side.

It imports nothing of zllm, so that it starts in tens of milliseconds. Messages are JSON, in the
frames of multiprocessing's Connection.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MEMORY_LIMIT = 1 << 30
"""Bytes of address space."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it means nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """What templates of the field expect: transformers' environment."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own would escape <, > and & for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def render(compile_: Callable[[str], jinja2.Template], job: dict[str, Any]) -> dict[str, str]:
    """`{"text": …}`, or `{"error": …}` for whatever the template raised."""
    try:
        pieces: list[str] = []
        room: int = job["max_chars"]
        # As one mapping: as keywords, a variable `self` would be a second one of generate()'s own.
        for piece in compile_(job["template"]).generate(job["variables"]):
            room -= len(piece)
            if room < 0:
                return {"error": f"it wrote more than {job['max_chars']} characters"}
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except MemoryError:
        return {"error": f"it took more than {MEMORY_LIMIT >> 20} MiB of memory"}
    # A template can raise anything: what it calls are Python's own methods.
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


def main(descriptor: int) -> None:
    # Not every kernel can limit the address space; the deadline holds everywhere.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    # Those that reach every process of a group are for the parent, which may have work to end: the
    # pipe's end ends this one.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    made = environment()
    templates: dict[str, jinja2.Template] = {}

    def compile_(source: str) -> jinja2.Template:
        if source not in templates:
            templates[source] = made.from_string(source)
        return templates[source]

    with Connection(descriptor) as parent:
        while True:
            try:
                job = json.loads(parent.recv_bytes())
            except EOFError:
                return
            signal.setitimer(signal.ITIMER_REAL, job["max_seconds"])
            answer = render(compile_, job)
            signal.setitimer(signal.ITIMER_REAL, 0)
            parent.send_bytes(json.dumps(answer).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]))
