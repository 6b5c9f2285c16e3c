"""Maps each error of zllm.errors to one gRPC status with google.rpc details; nothing else does."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from zllm.errors import (
    ConfigError,
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
    status = status_pb2.Status(code=code_of(error).value[0], message=str(error))
    detail: Message | None = None
    if isinstance(error, RequestError):
        violations = error.violations if isinstance(error, BadFields) else [error]
        detail = error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.reason)
                for v in violations
            ]
        )
    elif isinstance(error, (Overloaded, Unavailable)):
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        detail = error_details_pb2.RetryInfo(retry_delay=delay)
    if detail is not None:
        status.details.add().Pack(detail)
    return status


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: ZllmError) -> None:
    """Ends the call with the error's status. Raises, as every gRPC abort does."""
    details = details_of(error)
    await context.abort(
        code_of(error), str(error), trailing_metadata=((DETAILS_KEY, details.SerializeToString()),)
    )
