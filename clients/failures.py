"""Turns a failed call's status back into the error that the server raised."""

from __future__ import annotations

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from zllm.errors import (
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
    ZllmError,
)

_DETAILS_KEY = "grpc-status-details-bin"
_REQUEST_ERRORS: dict[grpc.StatusCode, type[RequestError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedRequest,
    grpc.StatusCode.NOT_FOUND: UnknownModel,
    grpc.StatusCode.ALREADY_EXISTS: RequestExists,
}

_TOO_LARGE = "message larger than max"
"""gRPC's own words, which it sends with the code of a full queue: but no time makes it fit."""


def to_error(failure: grpc.RpcError) -> Exception:
    """An error of zllm.errors, or TimeoutError where the deadline passed."""
    code, text = failure.code(), failure.details() or ""
    details = _details(failure)
    if code in _REQUEST_ERRORS:
        bad = error_details_pb2.BadRequest()
        if details is not None and any(d.Unpack(bad) for d in details.details):
            first = bad.field_violations[0]
            return _REQUEST_ERRORS[code](first.field, first.description)
        return _REQUEST_ERRORS[code]("request", text)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and details is None and _TOO_LARGE in text:
        return InvalidRequest("request", f"{text}: shorten it; max_message_bytes is the server's")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded(text, _retry_after(details))
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(text, _retry_after(details))
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimeoutError(text)
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return Unauthenticated(text)
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return Forbidden(text)
    if code is grpc.StatusCode.INTERNAL:
        return EngineError(text)
    return ZllmError(f"{code.name}: {text}")


def _details(failure: grpc.RpcError) -> status_pb2.Status | None:
    for key, value in failure.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _retry_after(details: status_pb2.Status | None) -> float:
    retry = error_details_pb2.RetryInfo()
    if details is not None and any(d.Unpack(retry) for d in details.details):
        return float(retry.retry_delay.ToNanoseconds() / 1e9)
    return 1.0
