"""How long a request will wait for its first token, from what its engine did lately.

The queue: how many requests and uncached prompt tokens were admitted a second while others waited
behind them. Without any behind them the rate would be that of the arrivals, not of the engine.

The prompt: a line through the times from first step to first token over the tokens computed, by
least squares in which older requests count less.
"""

from __future__ import annotations

from zllm.runtime.messages import Load

HALF_LIFE_S = 5.0
"""Of what the queue did, in seconds during which requests waited; of first tokens, in seconds."""
INTERVAL_S = 0.1
"""Between two looks at the queue, at least."""
KEEP = 0.98
"""A request's weight among first tokens, once another has come after it."""
FORGET_S = 10.0
"""Without any first token for so long, what they took is no measure any more: whoever is refused
for it brings no newer one, and an engine that has become idle would refuse for ever."""
LONGEST_S = 60.0
"""No estimate is above it: nobody knows so far ahead."""
UNKNOWN_RETRY_S = 1.0
SHORTEST_RETRY_S = 0.05


class QueueEstimate:
    """The rates at which a queue gets shorter. Without any history nothing is thought to wait."""

    def __init__(self) -> None:
        self._at = 0.0
        self._last: Load | None = None
        self._seconds = 0.0
        self._requests = 0.0
        self._tokens = 0.0

    def note(self, now: float, load: Load) -> None:
        """`load` as it is at `now`, in seconds of any clock that never goes back."""
        last, seconds = self._last, now - self._at
        if last is not None and seconds < INTERVAL_S:
            return
        self._at, self._last = now, load
        if last is None or not (last.queued_requests and load.queued_requests):
            return
        keep = 0.5 ** (seconds / HALF_LIFE_S)
        requests = load.admitted_requests - last.admitted_requests
        tokens = _computed(load) - _computed(last)
        self._seconds = self._seconds * keep + seconds
        self._requests = self._requests * keep + max(requests, 0)
        self._tokens = self._tokens * keep + max(tokens, 0)

    def wait(self, requests: int, tokens: int) -> float:
        """Seconds until so many requests and their uncached tokens have been admitted."""
        by_requests = self._time(requests, self._requests)
        return min(max(by_requests, self._time(tokens, self._tokens)), LONGEST_S)

    def retry_after(self, load: Load) -> float:
        """Seconds after which a refused request may find room: until half of the queue is gone."""
        if self._seconds == 0:
            return UNKNOWN_RETRY_S
        half = self.wait(load.queued_requests, load.queued_tokens) / 2
        return max(half, SHORTEST_RETRY_S)

    def _time(self, amount: int, done: float) -> float:
        if amount <= 0 or self._seconds == 0:
            return 0.0
        return amount * self._seconds / done if done > 0 else LONGEST_S


class FirstTokenEstimate:
    """Seconds from a request's first step to its first token. `now` is in seconds of any clock that
    never goes back."""

    def __init__(self) -> None:
        self._at = 0.0
        self._forget()

    def _forget(self) -> None:
        self._weight = 0.0
        self._prompts = 0.0
        self._tokens = 0.0
        self._seconds = 0.0
        self._tokens_tokens = 0.0
        self._tokens_seconds = 0.0

    def note(self, now: float, prompt_tokens: int, cached_tokens: int, seconds: float) -> None:
        """A request had its first token `seconds` after its first step."""
        if now - self._at > FORGET_S:
            self._forget()
        keep = KEEP * 0.5 ** ((now - self._at) / HALF_LIFE_S)
        self._at = now
        tokens = prompt_tokens - cached_tokens
        self._weight = self._weight * keep + 1
        self._prompts = self._prompts * keep + prompt_tokens
        self._tokens = self._tokens * keep + tokens
        self._seconds = self._seconds * keep + seconds
        self._tokens_tokens = self._tokens_tokens * keep + tokens * tokens
        self._tokens_seconds = self._tokens_seconds * keep + tokens * seconds

    def time(self, now: float, prompt_tokens: int) -> float:
        """For a prompt of which the same share is cached as of those before it. A longer one never
        takes less."""
        if self._prompts == 0 or now - self._at > FORGET_S:
            return 0.0
        tokens = prompt_tokens * self._tokens / self._prompts
        mean_tokens = self._tokens / self._weight
        mean_seconds = self._seconds / self._weight
        spread = self._tokens_tokens / self._weight - mean_tokens**2
        slope = 0.0
        # Below one token squared the prompts were all as long: what is left is rounding.
        if spread > 1:
            shared = self._tokens_seconds / self._weight - mean_tokens * mean_seconds
            slope = max(shared / spread, 0.0)
        return min(max(mean_seconds + slope * (tokens - mean_tokens), 0.0), LONGEST_S)


def _computed(load: Load) -> int:
    return load.prefix_query_tokens - load.prefix_hit_tokens
