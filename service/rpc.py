"""Binds a servicer to its contract: parse, run, answer errors with their status.

In place of the generated `add_…Servicer_to_server`, so that a malformed message is the sender's
error and every method's exceptions meet one mapping. Stream methods are plain coroutines that
`context.write`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from zllm.errors import UnsupportedRequest, ZllmError
from zllm.service.auth import ApiKeys
from zllm.service.calls import Call, Observer, set_call
from zllm.service.status import abort, code_of
from zllm.service.tenants import current_caller, set_caller
from zllm.service.wire import Parsed, parser

log = logging.getLogger(__name__)

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Method = Callable[[Any, Context], Awaitable[Any]]
_ON_ITS_WAY_S = 0.05
"""What a client's word that it has left may take, beside the rounding of its time."""
_M = TypeVar("_M", bound=Callable[..., Any])


def writes_bytes(method: _M) -> _M:
    """Marks a stream method that serializes its messages itself."""
    method.writes_bytes = True  # type: ignore[attr-defined]
    return method


def add_service(
    server: grpc.aio.Server,
    service: ServiceDescriptor,
    servicer: object,
    keys: ApiKeys | None = None,
    observers: Sequence[Observer] = (),
) -> None:
    """Methods that the servicer does not have answer UNIMPLEMENTED by name. With `keys`, a call
    needs one. `observers` hear of each call."""
    handlers = {
        method.name: _handler(method, getattr(servicer, method.name, None), keys, observers)
        for method in service.methods
    }
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service.full_name, handlers),)
    )


def _handler(
    method: MethodDescriptor,
    function: Method | None,
    keys: ApiKeys | None,
    observers: Sequence[Observer],
) -> grpc.RpcMethodHandler[Any, Any]:
    kind = (
        grpc.unary_stream_rpc_method_handler
        if method.server_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    serialize = message_factory.GetMessageClass(method.output_type).SerializeToString
    return kind(
        _answering(
            f"{method.containing_service.full_name}/{method.name}",
            function or _missing(method),
            parser(message_factory.GetMessageClass(method.input_type)),
            keys,
            observers,
        ),
        # Not parsed by gRPC: nobody's bytes are before the caller is known.
        request_deserializer=None,
        response_serializer=None if getattr(function, "writes_bytes", False) else serialize,
    )


def _answering(
    name: str,
    function: Method,
    parse: Callable[[bytes], Parsed],
    keys: ApiKeys | None,
    observers: Sequence[Observer],
) -> Method:
    async def respond(data: bytes, call: Call, context: Context) -> Any:
        try:
            if keys is not None:
                set_caller(keys.caller(call.metadata))
                call.tenant = current_caller().tenant
            request = parse(data)
            if isinstance(request, ZllmError):
                raise request
            return await function(request, context)
        except ZllmError as error:
            call.code, call.error = code_of(error), error
            await abort(context, error)
        except grpc.aio.AbortError:
            raise
        except asyncio.CancelledError:
            expired = _is_over(call.time_limit, context.time_remaining())
            codes = grpc.StatusCode
            call.code = codes.DEADLINE_EXCEEDED if expired else codes.CANCELLED
            raise
        except grpc.aio.InternalError as error:
            # A write failed: the client left, and gRPC has not cancelled this task yet.
            call.code = grpc.StatusCode.CANCELLED
            log.debug("an answer could not be sent: %s", error)
            with suppress(grpc.aio.UsageError):  # what could not be sent was a status already
                await abort(context, ZllmError("the answer could not be sent"))
            raise asyncio.CancelledError from error
        except Exception:
            # The text of an unforeseen exception may hold paths or prompts: it stays in the log.
            log.exception("unforeseen error in %s", name)
            call.code = grpc.StatusCode.INTERNAL
            await abort(context, ZllmError("internal error; the server's log says more"))

    async def answer(data: bytes, context: Context) -> Any:
        call = Call(name, dict(context.invocation_metadata() or ()), observers)
        call.time_limit = context.time_remaining()
        set_call(call)
        try:
            return await respond(data, call, context)
        except grpc.aio.InternalError as error:
            # Nor can its status be sent: it did leave.
            raise asyncio.CancelledError from error
        except grpc.aio.AbortError as aborted:
            # gRPC keeps it in a circle with the call: what led to it, down to the request's bytes,
            # would stay until a full garbage collection.
            aborted.__context__ = None
            raise aborted.with_traceback(None) from None
        finally:
            call.end()
            if call.error is not None:
                call.error.__traceback__ = None  # leads back to the stream, which holds the error
            call.error = call.stream = None  # the stream tells the call of its first token
            del call, data

    return answer


def _is_over(limit: float | None, left: float | None) -> bool:
    """Whether the client's time was over. It leaves by its own clock, and so before the server's:
    what it says of its time is rounded up, by a hundredth at most (gRPC's grpc-timeout)."""
    return limit is not None and left is not None and left <= 0.01 * limit + _ON_ITS_WAY_S


def _missing(method: MethodDescriptor) -> Method:
    async def refuse(request: Any, context: Context) -> Any:
        raise UnsupportedRequest(method.name, "this server does not implement it yet")

    return refuse
