"""The service's end of the engine: requests out, each step's tokens routed to their streams."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import msgspec

from zllm.errors import ConfigError, InvalidRequest, Overloaded, Unavailable
from zllm.native.pending import route
from zllm.runtime.messages import (
    CLIENT_SHIFT,
    AbortRequests,
    AddRequest,
    Attach,
    CacheFlushed,
    EngineFailed,
    EngineReady,
    EngineStats,
    FlushCache,
    FromEngine,
    Heartbeat,
    Load,
    Shutdown,
    StepOutput,
    ToEngine,
)
from zllm.service.engine_socket import EngineSocket
from zllm.service.estimates import FirstTokenEstimate, QueueEstimate
from zllm.service.streams import Stream

log = logging.getLogger(__name__)

LOAD_WINDOW_S = 60.0

_decode = msgspec.msgpack.Decoder(FromEngine).decode
_encode = msgspec.msgpack.Encoder().encode


class EngineClient:
    """`on_health` hears True when the engine answers and False when it is silent or dead. No two
    clients of an engine may ever have the same `number`."""

    def __init__(
        self,
        address: str,
        *,
        timeout: float,
        number: int = 0,
        on_health: Callable[[bool], None] | None = None,
    ) -> None:
        self.address = address
        self._socket = EngineSocket(address)
        self._number = number
        self._timeout = timeout
        self.on_health = on_health
        self._streams: dict[int, Stream] = {}
        self._next_id = (number << CLIENT_SHIFT) + 1
        self._last_heard = 0.0
        self._healthy = False
        self._lost: str | None = None
        self._flushes: deque[asyncio.Future[int]] = deque()
        self._first: asyncio.Future[FromEngine] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.load = Load()
        self.stats = EngineStats()
        self.queue = QueueEstimate()
        self.first_token = FirstTokenEstimate()
        self.gpu = ""
        self._history: deque[tuple[float, Load]] = deque()

    async def connect(self) -> EngineReady:
        """Waits for the engine's first message. Raises ConfigError with the engine's own words."""
        self._first = asyncio.get_running_loop().create_future()
        self._socket.open(self._hear)
        self._send(Attach(self._number))
        message = await self._first
        if isinstance(message, EngineFailed):
            raise ConfigError(message.message)
        if not isinstance(message, EngineReady):
            raise ConfigError(f"the engine began with {type(message).__name__}")
        self.gpu = message.gpu
        self._watcher = asyncio.create_task(self._watch())
        self._set_healthy(True)
        return message

    @property
    def healthy(self) -> bool:
        return self._healthy

    @property
    def lost(self) -> str | None:
        """Why it is not healthy, once it was lost."""
        return self._lost

    @property
    def live_streams(self) -> int:
        return len(self._streams)

    def time_to_first_token(self, prompt_tokens: int) -> float:
        """Seconds that a request of so many tokens will take, as far as is known."""
        wait = self.queue.wait(self.load.queued_requests, self.load.queued_tokens)
        now = asyncio.get_running_loop().time()
        return wait + self.first_token.time(now, prompt_tokens)

    @property
    def silence(self) -> float:
        """Seconds since the engine's last word."""
        return asyncio.get_running_loop().time() - self._last_heard

    def submit(self, request: AddRequest, stream: Stream) -> int:
        """Sends the request under a fresh id, which it returns. Raises Unavailable."""
        if not self._healthy:
            raise Unavailable(self._lost or "the engine does not answer")
        request_id = self._next_id
        self._next_id += 1
        self._streams[request_id] = stream
        self._send(msgspec.structs.replace(request, request_id=request_id))
        return request_id

    def release(self, request_id: int) -> None:
        """The handler is done with the request: one that still runs is aborted."""
        if self._streams.pop(request_id, None) is not None:
            self._send(AbortRequests([request_id]))

    def bury(self, why: str) -> None:
        """The engine's process is gone for good."""
        if self._watcher is not None:
            self._watcher.cancel()
        self._socket.close()
        self.lose(why)

    def lose(self, why: str) -> None:
        """The engine is silent: its requests fail, and new ones are refused until it speaks."""
        self._lost = why
        self._set_healthy(False)
        # Nothing runs there any more, and nothing could.
        self.load = msgspec.structs.replace(
            self.load, running_requests=0, queued_requests=0, queued_tokens=0, kv_blocks_free=0
        )
        if self._streams:
            self._send(AbortRequests(list(self._streams)))
        for stream in self._streams.values():
            stream.fail(Unavailable(why))
        self._streams.clear()
        if self._first is not None and not self._first.done():
            self._first.set_exception(ConfigError(why))
        while self._flushes:
            waiting = self._flushes.popleft()
            if not waiting.done():
                waiting.set_exception(Unavailable(why))

    def end_all(self, finish: int) -> None:
        """Ends every stream here and in the engine, keeping what it has."""
        self.end(list(self._streams), finish)

    def end(self, request_ids: list[int], finish: int) -> None:
        """Ends these streams here and in the engine; ids that are not live are no error."""
        live = [request_id for request_id in request_ids if request_id in self._streams]
        if live:
            self._send(AbortRequests(live))
        for request_id in live:
            self._streams.pop(request_id).push(-1, finish)

    async def flush_cache(self) -> int:
        """How many cached blocks the engine dropped. Raises Unavailable."""
        if not self._healthy:
            raise Unavailable(self._lost or "the engine does not answer")
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        # One whose caller left stays in line: answers come in order.
        self._flushes.append(answer)
        self._send(FlushCache())
        return await answer

    def window(self) -> tuple[float, float]:
        """Prefix hit rate and tokens a second over the last minute."""
        now = asyncio.get_running_loop().time()
        self._remember(now)
        then, old = self._history[0]
        queried = self.load.prefix_query_tokens - old.prefix_query_tokens
        hits = self.load.prefix_hit_tokens - old.prefix_hit_tokens
        tokens = self.load.generated_tokens - old.generated_tokens
        seconds = max(now - then, 1.0)
        return (hits / queried if queried > 0 else 0.0), tokens / seconds

    def shut_down(self) -> None:
        """Tells the engine to end."""
        self._send(Shutdown())

    async def close(self) -> None:
        """Stops listening, for good. What came while the engine was leaving fails."""
        self.bury(self._lost or "the engine was shut down")
        if self._watcher is not None:
            with suppress(asyncio.CancelledError):
                await self._watcher

    def _send(self, message: ToEngine) -> None:
        self._socket.send(_encode(message))

    def _hear(self, messages: list[bytes]) -> None:
        now = self._last_heard = asyncio.get_running_loop().time()
        try:
            for data in messages:
                self._take(_decode(data))
        except msgspec.DecodeError as error:
            # What it said is lost, and so are the streams that it spoke of.
            log.error("the engine sent what is no message: %s", error)
            self.lose("the engine sent what is no message")
            if self._first is not None and not self._first.done():
                self._first.set_exception(ConfigError("the engine began with what is no message"))
            return
        self.queue.note(now, self.load)
        if not self._history or now - self._history[-1][0] >= 1.0:
            self._remember(now)

    def _take(self, message: FromEngine) -> None:
        if self._first is not None and not self._first.done():
            self._first.set_result(message)
            return
        self._set_healthy(True)
        if isinstance(message, StepOutput):
            self.load = message.load
            self._route(message)
        elif isinstance(message, Heartbeat):
            self.load, self.stats = message.load, message.stats
        elif isinstance(message, CacheFlushed) and self._flushes:
            answer = self._flushes.popleft()
            if not answer.done():
                answer.set_result(message.blocks)

    def _route(self, step: StepOutput) -> None:
        streams = self._streams
        for started in step.started:
            stream = streams.get(started.request_id)
            if stream is not None:
                stream.start(started)
                self.first_token.note(
                    self._last_heard, stream.prompt_tokens, started.cached_tokens, started.prefill_s
                )
        for refused in step.refused:
            stream = streams.pop(refused.request_id, None)
            if stream is not None:
                stream.fail(
                    InvalidRequest(refused.field, refused.message)
                    if refused.field
                    else Overloaded(refused.message, self.queue.retry_after(step.load))
                )
        stopped = route(streams, step.request_ids, step.tokens, step.finishes, step.logprobs)
        if stopped:
            self._send(AbortRequests(stopped))

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            asleep = loop.time()
            await asyncio.sleep(self._timeout / 4)
            if loop.time() - asleep > self._timeout / 2:
                continue  # this process was held up: what the engine said is still unread
            silence = self.silence
            if self._healthy and silence > self._timeout:
                log.error("the engine has been silent for %.1f s", silence)
                self.lose(f"the engine has not answered for {silence:.0f} s")

    def _set_healthy(self, healthy: bool) -> None:
        if healthy != self._healthy:
            self._healthy = healthy
            if healthy:
                self._lost = None
            if self.on_health is not None:
                self.on_health(healthy)

    def _remember(self, now: float) -> None:
        self._history.append((now, self.load))
        while now - self._history[0][0] > LOAD_WINDOW_S and len(self._history) > 1:
            self._history.popleft()
