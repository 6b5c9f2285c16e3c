"""One rpc as operators see it: noted on its way, told to metrics, log and traces at its end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from zllm.errors import ZllmError
from zllm.service.streams import Stream
from zllm.v1 import generation_pb2


class Observer(Protocol):
    """Runs in the event loop: it must be quick, and must not raise."""

    def first_token(self, call: Call) -> None: ...
    def ended(self, call: Call) -> None: ...


@dataclass(slots=True)
class Call:
    """Times are time.monotonic's; the properties are seconds, None where it did not come so far."""

    method: str
    metadata: Mapping[str, str | bytes] = field(default_factory=dict)
    observers: Sequence[Observer] = ()
    began: float = field(default_factory=time.monotonic)
    time_limit: float | None = None
    """The client's."""
    ended: float = 0.0
    code: grpc.StatusCode = grpc.StatusCode.OK
    error: ZllmError | None = None
    tenant: str = ""
    request_id: str = ""
    model: str = ""
    """Empty until it is known to be served: no label and no log holds what a client made up."""
    request: generation_pb2.GenerateRequest | None = None
    prompt: Sequence[int] = ()
    stream: Stream | None = None

    def first_token(self) -> None:
        for observer in self.observers:
            observer.first_token(self)

    def end(self) -> None:
        self.ended = time.monotonic()
        for observer in self.observers:
            observer.ended(self)

    @property
    def started(self) -> Stream | None:
        """The stream, once it has had a token."""
        return self.stream if self.stream is not None and self.stream.started else None

    @property
    def finish_reason(self) -> str | None:
        """As the client is told, in lower case; None for a call that did not finish."""
        finish = self.stream.finish if self.stream is not None else None
        if finish is None or self.code is not grpc.StatusCode.OK:
            return None
        return finish.reason.name.lower()

    @property
    def queue_time(self) -> float | None:
        return self.started.queued_s if self.started else None

    @property
    def time_to_first_token(self) -> float | None:
        return self.started.first_token_at - self.began if self.started else None

    @property
    def decode_time(self) -> float | None:
        """From the first token to the last, as they came from the engine."""
        return self._last_token_at - self.started.first_token_at if self.started else None

    @property
    def latency(self) -> float:
        """To the last token: what a slow reader takes beyond that is not the server's."""
        return self._last_token_at - self.began

    @property
    def _last_token_at(self) -> float:
        return (self.stream.ended_at if self.stream is not None else 0.0) or self.ended


_current: ContextVar[Call] = ContextVar("call")


def current_call() -> Call:
    """The call that this task answers."""
    return _current.get()


def set_call(call: Call) -> None:
    """For the rest of this task: gRPC answers each call in a task of its own."""
    _current.set(call)
