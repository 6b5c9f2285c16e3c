"""Maps each error of zllm.errors to one gRPC status with google.rpc details; nothing else does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from zllm.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineError,
    Forbidden,
    InvalidRequest,
    Overloaded,
    RequestError,
    RequestExists,
    Unauthenticated,
    Unavailable,
    UnknownModel,
    UnsupportedRequest,
    WrongState,
    ZllmError,
)

DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""When gRPC's own retries try again (gRFC A6)."""

MAX_MESSAGE_BYTES = 1000
MAX_VIOLATIONS_BYTES = 2000
MAX_FIELD_BYTES = 200
"""A client takes 8 KiB of metadata by default, and an error is metadata: its message, which may
treble as it is percent-encoded, and the details in base64, which hold it once more. Of a longer one
the client would learn nothing but that it is too long."""

_CODES: list[tuple[type[ZllmError], grpc.StatusCode]] = [
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (UnsupportedRequest, grpc.StatusCode.UNIMPLEMENTED),
    (UnknownModel, grpc.StatusCode.NOT_FOUND),
    (RequestExists, grpc.StatusCode.ALREADY_EXISTS),
    (Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (Forbidden, grpc.StatusCode.PERMISSION_DENIED),
    (WrongState, grpc.StatusCode.FAILED_PRECONDITION),
    (ConfigError, grpc.StatusCode.FAILED_PRECONDITION),
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (EngineError, grpc.StatusCode.INTERNAL),
]


class BadFields(InvalidRequest):
    """Several fields at fault at once; its own field is the first one's."""

    def __init__(self, violations: list[InvalidRequest]) -> None:
        first, *others = violations
        reason = "; ".join([first.reason, *map(str, others)])
        super().__init__(first.field, reason)
        self.violations = violations


def code_of(error: ZllmError) -> grpc.StatusCode:
    return next(
        (code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL
    )


def details_of(error: ZllmError) -> status_pb2.Status:
    """BadRequest for a field at fault, RetryInfo where another try may succeed."""
    message = _cut(str(error), MAX_MESSAGE_BYTES)
    status = status_pb2.Status(code=code_of(error).value[0], message=message)
    detail: Message | None = None
    if isinstance(error, RequestError):
        violations = error.violations if isinstance(error, BadFields) else [error]
        detail = error_details_pb2.BadRequest(field_violations=_told(violations))
    elif isinstance(error, (Overloaded, Unavailable)):
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        detail = error_details_pb2.RetryInfo(retry_delay=delay)
    if detail is not None:
        status.details.add().Pack(detail)
    return status


def _told(
    violations: Iterable[RequestError],
) -> Iterator[error_details_pb2.BadRequest.FieldViolation]:
    """As many as there is room for, the first in any case."""
    room = MAX_VIOLATIONS_BYTES
    for violation in violations:
        field = _cut(violation.field, MAX_FIELD_BYTES)
        reason = _cut(violation.reason, MAX_MESSAGE_BYTES)
        room -= len(field.encode()) + len(reason.encode())
        if room < 0:
            return
        yield error_details_pb2.BadRequest.FieldViolation(field=field, description=reason)


def _cut(text: str, most: int) -> str:
    """At most so many bytes of it, in whole characters."""
    data = text.encode(errors="replace")
    return text if len(data) <= most else data[: most - 3].decode(errors="ignore") + "…"


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: ZllmError) -> None:
    """Ends the call with the error's status. Raises, as every gRPC abort does."""
    details = details_of(error)
    trailing: list[tuple[str, str | bytes]] = [(DETAILS_KEY, details.SerializeToString())]
    if isinstance(error, Overloaded):
        # Not where the server is unavailable: another one may take the next try at once.
        trailing.append((PUSHBACK_KEY, str(math.ceil(error.retry_after * 1e3))))
    await context.abort(code_of(error), details.message, trailing_metadata=tuple(trailing))
