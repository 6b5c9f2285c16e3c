"""The synchronous client.

with Client("127.0.0.1:50051") as client:
    print(client.generate("12 + 7 =", max_tokens=8).text)
    for delta in client.chat("Count from 1 to 5."):
        print(delta.text, end="")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from zllm.clients.service_config import MAX_ATTEMPTS, channel_options
from zllm.errors import ZllmError
from zllm.v1 import generation_pb2_grpc, models_pb2, models_pb2_grpc


class Stream:
    """Iterates over Deltas. `usage` and `timing` are there once it has ended; leaving its `with`
    block or calling cancel() ends the request."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.request_id = ""
        self.model = ""
        self.prompt_token_ids: tuple[int, ...] = ()
        self.usage: Usage | None = None
        self.timing: Timing | None = None

    def __iter__(self) -> Iterator[Delta]:
        try:
            for message in self._call:
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
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Ends the request; one that has ended is left alone."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()


class Client:
    """Talks to one server. Errors are those of zllm.errors, or TimeoutError."""

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        attempts: int = MAX_ATTEMPTS,
        api_key: str = "",
        tls: Tls | None = None,
    ) -> None:
        options = channel_options(target, attempts)
        self._metadata = key_metadata(api_key)
        if tls is None:
            self._channel = grpc.insecure_channel(target, options=options)
        else:
            self._channel = grpc.secure_channel(target, tls.credentials(), options=options)
        self._closed = False
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._models = models_pb2_grpc.ModelServiceStub(self._channel)

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Any
    ) -> Completion:
        """One whole answer to text, token ids or chat messages; see build_request for options."""
        request = build_request(prompt, **options)
        return read_completion(self._call(self._generation.Generate, request, timeout))

    def stream(self, prompt: Prompt, *, timeout: float | None = None, **options: Any) -> Stream:
        """The same, as it comes."""
        request = build_request(prompt, **options)
        self._require_open()
        call = self._generation.StreamGenerate(
            request, timeout=deadline(timeout), metadata=self._metadata
        )
        return Stream(call)

    def chat(
        self, messages: str | Sequence[Message], *, timeout: float | None = None, **options: Any
    ) -> Stream:
        """Streams the next turn; a string is a single turn of the user."""
        first = {"role": "user", "content": str(messages)}
        turns = [first] if isinstance(messages, str) else messages
        return self.stream(turns, timeout=timeout, **options)

    def models(self, *, timeout: float | None = None) -> list[ModelInfo]:
        answer = self._call(self._models.ListModels, models_pb2.ListModelsRequest(), timeout)
        return [read_model(model) for model in answer.models]

    def tokenize(
        self,
        text: str,
        *,
        model: str = "",
        add_special_tokens: bool = False,
        timeout: float | None = None,
    ) -> list[int]:
        request = tokenize_request(text, model, add_special_tokens)
        return list(self._call(self._models.Tokenize, request, timeout).ids)

    def detokenize(
        self,
        ids: list[int],
        *,
        model: str = "",
        skip_special_tokens: bool = False,
        timeout: float | None = None,
    ) -> str:
        request = detokenize_request(ids, model, skip_special_tokens)
        return str(self._call(self._models.Detokenize, request, timeout).text)

    def wait_ready(self, timeout: float) -> None:
        """Until a connection stands. Raises TimeoutError."""
        self._require_open()
        ready = grpc.channel_ready_future(self._channel)
        try:
            ready.result(deadline(timeout))
        except grpc.FutureTimeoutError:
            ready.cancel()  # it would listen to the channel for as long as that lives
            raise TimeoutError(f"no server answered within {timeout:g} s") from None

    def close(self) -> None:
        """Ends every call that runs; a later one is a ZllmError."""
        self._closed = True
        self._channel.close()

    def _require_open(self) -> None:
        if self._closed:
            raise ZllmError("the client is closed: make a new one")

    def _call(self, method: Any, request: object, timeout: float | None) -> Any:
        self._require_open()
        try:
            return method(request, timeout=deadline(timeout), metadata=self._metadata)
        except grpc.RpcError as failure:
            raise to_error(failure) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
