"""One Stream a request: what the engine gave and the client has not got yet, merged.

The engine side pushes tokens; the gRPC handler takes all that came since its last write as one
delta. So a slow reader gets fewer, larger deltas, nothing is dropped, and what is pending is at
most one request's own output.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from zllm.errors import EngineError, Overloaded, Unavailable, ZllmError
from zllm.native.pending import Delta, Pending
from zllm.runtime.detokenizer import Detokenizer
from zllm.runtime.messages import FinishReason, RequestStarted, TokenLogprobs

WHOLE = 2**31
"""More tokens than any sequence has: a delta that waits for the end."""


@dataclass(frozen=True)
class Finish:
    reason: FinishReason
    stop_token_id: int | None = None
    stop_string: str | None = None


class Stream(Pending):
    """`min_tokens` is how many tokens a delta waits for; the last one waits for none.

    Pending has what every token takes. `plain` is cleared where there is more to do than text: at
    stop strings, log-probabilities and the end.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        keep_stop: bool = False,
        min_tokens: int = 1,
        prompt_tokens: int = 0,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(detokenizer.plain, min_tokens)
        # A stop string must be found when it comes, however slow the reader; text without any
        # is cheaper to make once a delta.
        self._eager = detokenizer.plain is None
        self._detokenizer = detokenizer
        self._keep_stop = keep_stop
        self._on_start = on_start
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._finish: FinishReason | None = None
        self._closed = False
        self._error: ZllmError | None = None
        self.arrived = time.monotonic()
        self.first_token_at = self.arrived
        self.ended_at = 0.0
        self.started = False
        self._beginning: asyncio.Future[None] | None = None
        self.finish: Finish | None = None
        self.cached_tokens = 0
        self.queued_s = 0.0
        self.prefill_s = 0.0
        self.prompt_tokens = prompt_tokens
        self.cumulative_logprob = 0.0

    @property
    def produced_tokens(self) -> int:
        """What the engine gave, whether or not anyone took it."""
        return self.completion_tokens + self.num_pending

    @property
    def refused(self) -> bool:
        """It was not let in, or its engine was lost before it began."""
        return not self.started and isinstance(self._error, (Overloaded, Unavailable))

    def start(self, started: RequestStarted) -> None:
        self.cached_tokens = started.cached_tokens
        self.queued_s = started.queued_s
        self.prefill_s = started.prefill_s
        self.first_token_at = time.monotonic()
        self.started = True
        self._on_start()
        self._wake_begun()

    def push(self, token: int, finish: int, logprobs: TokenLogprobs | None = None) -> bool:
        """One entry of a step: a token, a finish or both. True: a stop string just ended it,
        which the engine does not know."""
        if self.over:
            return False
        if token >= 0:
            self.undigested.append(token)
            self.num_pending += 1
            if logprobs is not None:
                self.plain = None
                self._logprobs.append(logprobs)
        if finish:
            self._end(FinishReason(finish))
        elif self._eager:
            self._digest()
        stopped = self._closed
        if self.due():
            self.wake()
        return stopped

    def fail(self, error: ZllmError) -> None:
        if not self.over:
            self._error = error
            self._stop()
            self.wake()

    async def begun(self) -> None:
        """Waits for the first token, or an end without any. Raises what the request failed with
        before it began."""
        if not self.started and not self.over:
            self._beginning = asyncio.get_running_loop().create_future()
            await self._beginning
        if self._error is not None and not self.started:
            raise self._error

    async def take(self) -> Delta:
        """Waits for the next delta. Raises what the request failed with, after the deltas that
        came before."""
        if self.due():
            return self.gather()
        waiter: asyncio.Future[Delta] = asyncio.get_running_loop().create_future()
        self.waiter = waiter
        return await waiter

    async def take_whole(self) -> Delta:
        """Waits for the end and returns all of it, or raises what the request failed with."""
        self.min_tokens = WHOLE
        delta = await self.take()
        if self._error is not None:
            raise self._error
        return delta

    def gather_rest(self) -> Delta:
        """gather() where text is not all that there is to do."""
        self._digest()
        if self._error is not None and not self._token_ids:
            raise self._error
        finish = self.finish if self._closed else None
        delta = Delta(self._text, self._token_ids, self._logprobs, finish)
        self._text, self._token_ids, self.num_pending = "", [], 0
        self.completion_tokens += len(delta.token_ids)
        if self.taken is not None:
            self.taken.append(delta.text)
        if delta.logprobs:
            self._logprobs = []
            self.cumulative_logprob += sum(entry.logprob for entry in delta.logprobs)
        return delta

    def _digest(self) -> None:
        """Turns the tokens that came into text, up to a stop string; the rest is dropped."""
        tokens, self.undigested = self.undigested, []
        if self._closed:
            return
        shown = tokens
        if self._finish is not None and self._hides_last_token(self._finish):
            shown = tokens[:-1]
        text, taken = self._detokenizer.extend(shown)
        matched = self._detokenizer.matched_stop
        if matched is not None:
            tokens = shown[:taken]
        elif self._finish is not None:
            text += self._detokenizer.flush()
            matched = self._detokenizer.matched_stop
        self._text += text
        self._token_ids += tokens
        if matched is not None:
            self._close(Finish(FinishReason.STOP, stop_string=matched))
        elif self._finish is not None:
            last = self._token_ids[-1] if self._finish is FinishReason.STOP else None
            self._close(Finish(self._finish, stop_token_id=last))

    def _hides_last_token(self, finish: FinishReason) -> bool:
        """The token that ended the turn is an id of the output, but no text of it."""
        return not self._keep_stop and finish in (FinishReason.EOS, FinishReason.STOP)

    def _close(self, finish: Finish) -> None:
        self.finish = finish
        self._closed = True
        self._stop()
        del self._logprobs[len(self._token_ids) :]
        self.ended_at = self.ended_at or time.monotonic()

    def _stop(self) -> None:
        self.over = True
        self.plain = None
        self._wake_begun()

    def _wake_begun(self) -> None:
        waiter, self._beginning = self._beginning, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _end(self, reason: FinishReason) -> None:
        self._stop()
        self.ended_at = time.monotonic()
        if reason is FinishReason.QUEUE_TIMEOUT:
            self._error = Overloaded(
                "queue_timeout passed before the request could start", cause="queue_timeout"
            )
        elif reason is FinishReason.ERROR:
            self._error = EngineError("the engine could not go on with this request")
        else:
            self._finish = reason
