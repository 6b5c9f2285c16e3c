"""One Stream a request: what the engine gave and the client has not got yet, merged.

The engine side pushes tokens; the gRPC handler takes all that came since its last write as one
delta. So a slow reader gets fewer, larger deltas, nothing is dropped, and what is pending is at
most one request's own output.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from zllm.errors import EngineError, Overloaded, ZllmError
from zllm.runtime.detokenizer import Detokenizer
from zllm.runtime.messages import FinishReason, RequestStarted, TokenLogprobs


@dataclass(frozen=True)
class Finish:
    reason: FinishReason
    stop_token_id: int | None = None
    stop_string: str | None = None


@dataclass
class Delta:
    """What a sequence gained since the last take."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: Finish | None = None


class Stream:
    """`min_tokens` is how many tokens a delta waits for; the last one waits for none."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        has_stop_strings: bool = False,
        keep_stop: bool = False,
        min_tokens: int = 1,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        self._detokenizer = detokenizer
        self._keep_stop = keep_stop
        # A stop string must be found when it comes, however slow the reader; text without any
        # is cheaper to make once a delta.
        self._eager = has_stop_strings
        self._min_tokens = min_tokens
        self._on_start = on_start
        self._undigested: list[int] = []
        self._finish: FinishReason | None = None
        self._pending = Delta()
        self._closed = False
        self._error: ZllmError | None = None
        self._wake = asyncio.Event()
        self.arrived = time.monotonic()
        self.first_token_at = self.arrived
        self.ended_at = 0.0
        self.started = False
        self.finish: Finish | None = None
        self.cached_tokens = 0
        self.queued_s = 0.0
        self.prefill_s = 0.0
        self.completion_tokens = 0
        self.cumulative_logprob = 0.0
        self.taken: list[str] | None = None
        """The text of all deltas, where somebody put a list here."""

    @property
    def over(self) -> bool:
        """Nothing more will come."""
        return self._closed or self._error is not None or self._finish is not None

    def start(self, started: RequestStarted) -> None:
        self.cached_tokens = started.cached_tokens
        self.queued_s = started.queued_s
        self.prefill_s = started.prefill_s
        self.first_token_at = time.monotonic()
        self.started = True
        self._on_start()

    def push(self, token: int, finish: int, logprobs: TokenLogprobs | None = None) -> bool:
        """One entry of a step: a token, a finish or both. True: a stop string just ended it,
        which the engine does not know."""
        if self.over:
            return False
        if token >= 0:
            self._undigested.append(token)
            if logprobs is not None:
                self._pending.logprobs.append(logprobs)
        if finish:
            self._end(FinishReason(finish))
        stopped = False
        if self._eager and not finish:
            self._digest()
            stopped = self._closed
        if self.over or stopped or self._count() >= self._min_tokens:
            self._wake.set()
        return stopped

    def fail(self, error: ZllmError) -> None:
        if not self.over:
            self._error = error
            self._wake.set()

    async def take(self) -> Delta:
        """Waits for the next delta. Raises what the request failed with, after the deltas that
        came before."""
        await self._wake.wait()
        self._wake.clear()
        self._digest()
        delta = self._pending
        if self._error is not None and not delta.token_ids:
            raise self._error
        self._pending = Delta()
        if self._error is not None:
            self._wake.set()
        self.completion_tokens += len(delta.token_ids)
        if self.taken is not None:
            self.taken.append(delta.text)
        self.cumulative_logprob += sum(entry.logprob for entry in delta.logprobs)
        return delta

    async def take_whole(self) -> Delta:
        """Waits for the end and returns all of it, or raises what the request failed with."""
        while not self.over:
            self._wake.clear()
            await self._wake.wait()
        if self._error is not None:
            raise self._error
        self._wake.set()
        return await self.take()

    def _digest(self) -> None:
        """Turns the tokens that came into text, up to a stop string; the rest is dropped."""
        tokens, self._undigested = self._undigested, []
        pending = self._pending
        if self._closed:
            return
        hidden = self._hides_last_token()
        pieces = [pending.text]
        for index, token in enumerate(tokens, start=1):
            pending.token_ids.append(token)
            if hidden and index == len(tokens):
                break
            pieces.append(self._detokenizer.push(token))
            if self._detokenizer.matched_stop is not None:
                self._close(Finish(FinishReason.STOP, stop_string=self._detokenizer.matched_stop))
                break
        if self._finish is not None and not self._closed:
            pieces.append(self._detokenizer.flush())
            matched = self._detokenizer.matched_stop
            if matched is not None:
                self._close(Finish(FinishReason.STOP, stop_string=matched))
            else:
                last = pending.token_ids[-1] if self._finish is FinishReason.STOP else None
                self._close(Finish(self._finish, stop_token_id=last))
        pending.text = "".join(pieces)
        del pending.logprobs[len(pending.token_ids) :]

    def _hides_last_token(self) -> bool:
        """The token that ended the turn is an id of the output, but no text of it."""
        ended = self._finish in (FinishReason.EOS, FinishReason.STOP)
        return ended and not self._keep_stop

    def _close(self, finish: Finish) -> None:
        self._pending.finish = self.finish = finish
        self._closed = True
        self.ended_at = self.ended_at or time.monotonic()

    def _count(self) -> int:
        return len(self._undigested) + len(self._pending.token_ids)

    def _end(self, reason: FinishReason) -> None:
        self.ended_at = time.monotonic()
        if reason is FinishReason.QUEUE_TIMEOUT:
            self._error = Overloaded(
                "queue_timeout passed before the request could start", cause="queue_timeout"
            )
        elif reason is FinishReason.ERROR:
            self._error = EngineError("the engine could not go on with this request")
        else:
            self._finish = reason
