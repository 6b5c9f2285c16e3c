"""Binds a servicer to its contract: parse, run, answer errors with their status.

In place of the generated `add_…Servicer_to_server`, so that a malformed message is the sender's
error and every method's exceptions meet one mapping. Stream methods are plain coroutines that
`context.write`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from zllm.errors import UnsupportedRequest, ZllmError
from zllm.service.auth import ApiKeys
from zllm.service.status import abort
from zllm.service.tenants import set_caller
from zllm.service.wire import Parsed, parser

log = logging.getLogger(__name__)

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Method = Callable[[Any, Context], Awaitable[Any]]


def add_service(
    server: grpc.aio.Server,
    service: ServiceDescriptor,
    servicer: object,
    keys: ApiKeys | None = None,
) -> None:
    """Methods that the servicer does not have answer UNIMPLEMENTED by name. With `keys`, a call
    needs one."""
    handlers = {m.name: _handler(m, getattr(servicer, m.name, None), keys) for m in service.methods}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service.full_name, handlers),)
    )


def _handler(
    method: MethodDescriptor, function: Method | None, keys: ApiKeys | None
) -> grpc.RpcMethodHandler[Any, Any]:
    kind = (
        grpc.unary_stream_rpc_method_handler
        if method.server_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    return kind(
        _answering(
            function or _missing(method),
            parser(message_factory.GetMessageClass(method.input_type)),
            keys,
        ),
        # Not parsed by gRPC: nobody's bytes are before the caller is known.
        request_deserializer=None,
        response_serializer=message_factory.GetMessageClass(method.output_type).SerializeToString,
    )


def _answering(function: Method, parse: Callable[[bytes], Parsed], keys: ApiKeys | None) -> Method:
    async def respond(data: bytes, context: Context) -> Any:
        try:
            if keys is not None:
                set_caller(keys.caller(dict(context.invocation_metadata() or ())))
            request = parse(data)
            if isinstance(request, ZllmError):
                raise request
            return await function(request, context)
        except ZllmError as error:
            await abort(context, error)
        except grpc.aio.AbortError:
            raise
        except grpc.aio.InternalError as error:
            # A write failed: the client left, and gRPC has not cancelled this task yet.
            log.debug("an answer could not be sent: %s", error)
            await abort(context, ZllmError("the answer could not be sent"))
        except Exception:
            # The text of an unforeseen exception may hold paths or prompts: it stays in the log.
            log.exception("unforeseen error in %s", getattr(function, "__qualname__", function))
            await abort(context, ZllmError("internal error; the server's log says more"))

    async def answer(data: bytes, context: Context) -> Any:
        try:
            return await respond(data, context)
        except grpc.aio.InternalError as error:
            # Nor can its status be sent: it did leave.
            raise asyncio.CancelledError from error

    return answer


def _missing(method: MethodDescriptor) -> Method:
    async def refuse(request: Any, context: Context) -> Any:
        raise UnsupportedRequest(method.name, "this server does not implement it yet")

    return refuse
