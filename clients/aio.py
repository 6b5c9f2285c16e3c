"""The asyncio client: the surface of Client, awaited.

async with AsyncClient("127.0.0.1:50051") as client:
    async for delta in client.chat("Count from 1 to 5."):
        print(delta.text, end="")
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc

from zllm.clients.credentials import Tls, key_metadata
from zllm.clients.failures import to_error
from zllm.clients.request import (
    Message,
    Prompt,
    build_request,
    deadline,
    detokenize_request,
    tokenize_request,
)
from zllm.clients.results import (
    Completion,
    Delta,
    ModelInfo,
    Timing,
    Usage,
    read_completion,
    read_delta,
    read_model,
    read_timing,
    read_usage,
)
from zllm.clients.service_config import MAX_ATTEMPTS, Options, channel_options
from zllm.errors import ZllmError
from zllm.v1 import generation_pb2_grpc, models_pb2, models_pb2_grpc


def _task_is_cancelled() -> bool:
    """Whether the task that waits is, and not just the call that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class AsyncStream:
    """Iterates over Deltas. `usage` and `timing` are there once it has ended; a task that is
    cancelled while it waits, or cancel(), ends the request."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.request_id = ""
        self.model = ""
        self.prompt_token_ids: tuple[int, ...] = ()
        self.usage: Usage | None = None
        self.timing: Timing | None = None

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            async for message in self._call:
                event = message.WhichOneof("event")
                if event == "delta":
                    yield read_delta(message.delta)
                elif event == "started":
                    self.request_id = message.started.request_id
                    self.model = message.started.model
                    self.prompt_token_ids = tuple(message.started.prompt.token_ids)
                elif event == "finished":
                    self.usage = read_usage(message.finished.usage)
                    self.timing = read_timing(message.finished.timing)
        except grpc.RpcError as failure:
            raise to_error(failure) from None
        except asyncio.CancelledError:
            if _task_is_cancelled():
                raise
            raise ZllmError("CANCELLED: cancel() ended the request") from None
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Ends the request; one that has ended is left alone."""
        self._call.cancel()

    def __del__(self) -> None:
        # gRPC keeps a call that nobody has begun to read, and would let it run to its end.
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()


@dataclass(frozen=True, slots=True)
class _Connection:
    loop: asyncio.AbstractEventLoop
    channel: grpc.aio.Channel
    generation: generation_pb2_grpc.GenerationServiceStub
    models: models_pb2_grpc.ModelServiceStub

    @classmethod
    def make(
        cls,
        loop: asyncio.AbstractEventLoop,
        target: str,
        credentials: grpc.ChannelCredentials | None,
        options: Options,
    ) -> _Connection:
        if credentials is None:
            channel = grpc.aio.insecure_channel(target, options=options)
        else:
            channel = grpc.aio.secure_channel(target, credentials, options=options)
        return cls(
            loop,
            channel,
            generation_pb2_grpc.GenerationServiceStub(channel),
            models_pb2_grpc.ModelServiceStub(channel),
        )


class AsyncClient:
    """Talks to one server. It may be made anywhere, and connects from the event loop that uses it;
    another loop, after that one, connects anew. Errors are those of zllm.errors, or
    TimeoutError."""

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        attempts: int = MAX_ATTEMPTS,
        api_key: str = "",
        tls: Tls | None = None,
    ) -> None:
        self._target = target
        self._options = channel_options(target, attempts)
        self._credentials = None if tls is None else tls.credentials()
        self._metadata = key_metadata(api_key)
        self._connection: _Connection | None = None
        self._closed = False

    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Any
    ) -> Completion:
        """One whole answer to text, token ids or chat messages; see build_request for options."""
        request = build_request(prompt, **options)
        generate = self._connected().generation.Generate
        return read_completion(await self._call(generate, request, timeout))

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Any
    ) -> AsyncStream:
        """The same, as it comes."""
        request = build_request(prompt, **options)
        stream = self._connected().generation.StreamGenerate
        return AsyncStream(stream(request, timeout=deadline(timeout), metadata=self._metadata))

    def chat(
        self, messages: str | Sequence[Message], *, timeout: float | None = None, **options: Any
    ) -> AsyncStream:
        """Streams the next turn; a string is a single turn of the user."""
        first = {"role": "user", "content": str(messages)}
        turns = [first] if isinstance(messages, str) else messages
        return self.stream(turns, timeout=timeout, **options)

    async def models(self, *, timeout: float | None = None) -> list[ModelInfo]:
        list_models = self._connected().models.ListModels
        answer = await self._call(list_models, models_pb2.ListModelsRequest(), timeout)
        return [read_model(model) for model in answer.models]

    async def tokenize(
        self,
        text: str,
        *,
        model: str = "",
        add_special_tokens: bool = False,
        timeout: float | None = None,
    ) -> list[int]:
        request = tokenize_request(text, model, add_special_tokens)
        return list((await self._call(self._connected().models.Tokenize, request, timeout)).ids)

    async def detokenize(
        self,
        ids: list[int],
        *,
        model: str = "",
        skip_special_tokens: bool = False,
        timeout: float | None = None,
    ) -> str:
        request = detokenize_request(ids, model, skip_special_tokens)
        return str((await self._call(self._connected().models.Detokenize, request, timeout)).text)

    async def wait_ready(self, timeout: float) -> None:
        """Until a connection stands. Raises TimeoutError."""
        channel = self._connected().channel
        try:
            async with asyncio.timeout(deadline(timeout)):
                await channel.channel_ready()
        except TimeoutError:
            raise TimeoutError(f"no server answered within {timeout:g} s") from None

    async def close(self) -> None:
        """Ends every call that runs, in the loop that uses it; a later one is a ZllmError."""
        self._closed = True
        connection, self._connection = self._connection, None
        # One of a loop that has ended went with it.
        if connection is not None and connection.loop is asyncio.get_running_loop():
            await connection.channel.close()

    def _connected(self) -> _Connection:
        """The running loop's connection: a channel is good for the loop that it was made in."""
        if self._closed:
            raise ZllmError("the client is closed: make a new one")
        loop, connection = asyncio.get_running_loop(), self._connection
        if connection is None or connection.loop is not loop:
            connection = _Connection.make(loop, self._target, self._credentials, self._options)
            self._connection = connection
        return connection

    async def _call(self, method: Any, request: object, timeout: float | None) -> Any:
        try:
            return await method(request, timeout=deadline(timeout), metadata=self._metadata)
        except grpc.RpcError as failure:
            raise to_error(failure) from None
        except asyncio.CancelledError:
            if _task_is_cancelled():
                raise
            raise ZllmError("CANCELLED: close() ended the call") from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
