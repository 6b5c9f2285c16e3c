"""Chat messages to a prompt, through the model's own template."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from signal import SIGALRM
from typing import Any

import jinja2

from zllm.errors import InvalidRequest, ModelLoadError
from zllm.runtime import chat_renderer
from zllm.runtime.json_files import read_object
from zllm.runtime.special_tokens import load_special_tokens

_RESERVED = frozenset({"messages", "tools", "documents", "raise_exception", "strftime_now"})


class ChatTemplate:
    """A model's template. Safe to use from several threads, which take turns.

    Rendering happens in a child process (see chat_renderer.py): a template that loops or grows
    without end costs one request, `max_seconds` and that process.
    """

    def __init__(
        self,
        source: str,
        *,
        tools_source: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        max_seconds: float = 2.0,
        max_chars: int = 8 << 20,
    ) -> None:
        """`tools_source` is used instead where there are tools. Raises ModelLoadError where a
        template does not parse."""
        self._source = source
        self._tools_source = tools_source or source
        self._special_tokens = dict(special_tokens or {})
        self._max_seconds = max_seconds
        self._max_chars = max_chars
        self._renderer: _Renderer | None = None
        self._lock = threading.Lock()
        for text in {self._source, self._tools_source}:
            try:
                chat_renderer.environment().parse(text)
            except jinja2.TemplateSyntaxError as error:
                raise ModelLoadError(
                    f"the chat template does not parse, line {error.lineno}: {error.message}"
                ) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, up to where the assistant speaks.

        `variables` go to the template as they are, except that a whole number written as a float
        (a protobuf Struct knows no other) becomes an int; `add_generation_prompt` may be among
        them. Raises InvalidRequest where the template refuses, or takes too long or too much.
        """
        given = dict(variables or {})
        if taken := sorted(_RESERVED & given.keys()):
            raise InvalidRequest("chat.template_kwargs", f"{taken[0]!r} is the template's own name")
        context = {
            "add_generation_prompt": True,
            **self._special_tokens,
            **_with_integers(given),
            "messages": [dict(message) for message in messages],
            "tools": list(tools) if tools else None,
            "documents": None,
        }
        job = {
            "template": self._tools_source if tools else self._source,
            "variables": context,
            "max_chars": self._max_chars,
            "max_seconds": self._max_seconds,
        }
        answer = self._ask(json.dumps(job).encode())
        if "error" in answer:
            raise InvalidRequest("chat", f"the chat template failed: {answer['error']}")
        return answer["text"]

    def _ask(self, job: bytes) -> dict[str, str]:
        with self._lock:
            answer, code = self._ask_once(job)
            # One that was killed from without is no fault of the template: another one may answer.
            if answer is None and code != -SIGALRM:
                answer, code = self._ask_once(job)
        if answer is not None:
            return answer
        if code == -SIGALRM:
            return {"error": f"it took more than {self._max_seconds:g} s"}
        return {"error": f"its process ended with code {code}, and another one, too"}

    def _ask_once(self, job: bytes) -> tuple[dict[str, str] | None, int]:
        """The answer, or None and the code with which the child process ended."""
        if self._renderer is None:
            self._renderer = _Renderer()
        try:
            return self._renderer.ask(job), 0
        except (EOFError, OSError):
            code = self._renderer.close()
            self._renderer = None
            return None, code
        except BaseException:  # an answer left in the pipe would be the next job's
            self._renderer.close()
            self._renderer = None
            raise

    def close(self) -> None:
        """Ends the child process; a later render starts another."""
        with self._lock:
            if self._renderer is not None:
                self._renderer.close()
                self._renderer = None


class _Renderer:
    """The child process. It ends by itself when its end of the pipe closes."""

    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        descriptor = theirs.fileno()
        # -P: the program's folder must not come first where modules are looked for.
        self._process = subprocess.Popen(
            [sys.executable, "-P", chat_renderer.__file__, str(descriptor)],
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()

    def ask(self, job: bytes) -> dict[str, str]:
        """Raises EOFError or OSError where the process has ended."""
        self._pipe.send_bytes(job)
        answer: dict[str, str] = json.loads(self._pipe.recv_bytes())
        return answer

    def close(self) -> int:
        """The exit code; negative is the signal."""
        self._pipe.close()
        return self._process.wait()


def _with_integers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_integers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_integers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of a model folder, or None where it has none. Raises ModelLoadError.

    Of named templates, `default` and `tool_use` count. `chat_template.jinja`, which is the default,
    and `additional_chat_templates/NAME.jinja` go before tokenizer_config.json, where it is a
    text or a list of named ones.
    """
    config = read_object(folder / "tokenizer_config.json") or {}
    sources = _sources(folder, config.get("chat_template"))
    if "default" not in sources:
        return None
    return ChatTemplate(
        sources["default"],
        tools_source=sources.get("tool_use"),
        special_tokens=load_special_tokens(folder).named,
    )


def _sources(folder: Path, configured: Any) -> dict[str, str]:
    """Templates by name."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in (folder / "additional_chat_templates").glob("*.jinja")}
    texts = {}
    for name, file in files.items():
        try:
            if file.is_file():
                texts[name] = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{file} cannot be read: {error}") from None
    if texts:
        return texts
    if not configured:
        return {}
    if isinstance(configured, str):
        return {"default": configured}
    sources: dict[str, Any] | None = None
    with suppress(KeyError, TypeError):
        sources = {entry["name"]: entry["template"] for entry in configured}
    if sources is None or not all(isinstance(source, str) for source in sources.values()):
        raise ModelLoadError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a text, or a list of texts "
            "with a name and a template each"
        )
    return sources
