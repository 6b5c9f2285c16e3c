"""What the engine gave a stream and its client has not got yet: the part that every token takes.

What only some need is in service/streams.py.
"""

from typing import Any, Protocol

from zllm.native.utf8_text import Utf8Text

class Delta:
    """What a sequence gained since the last take."""

    text: str
    token_ids: list[int]
    logprobs: list[Any]
    """A messages.TokenLogprobs a token, or none."""
    finish: Any
    """A streams.Finish on the sequence's last delta, else None."""
    def __init__(
        self, text: str, token_ids: list[int], logprobs: list[Any], finish: Any
    ) -> None: ...

class Waiter(Protocol):
    """Who takes the next delta: an asyncio.Future, or what is like one."""

    def done(self) -> bool: ...
    def set_result(self, result: Delta, /) -> None: ...
    def set_exception(self, exception: Exception, /) -> None: ...

class Pending:
    plain: Utf8Text | None
    """What makes the text, while that is all that is to be done; else push() and gather_rest() of
    a derived class do it."""
    undigested: list[int]
    """Tokens that are not text yet."""
    num_pending: int
    """Tokens that were not taken yet."""
    min_tokens: int
    over: bool
    """Nothing more will come."""
    completion_tokens: int
    """Of all deltas."""
    taken: list[str] | None
    """The text of all deltas, where somebody put a list here."""
    waiter: Waiter | None
    def __init__(self, plain: Utf8Text | None, min_tokens: int) -> None: ...
    def due(self) -> bool:
        """Whether gather() has something to give or to raise."""
    def wake(self) -> None:
        """Gives the delta to who waits, if anyone does."""
    def gather(self) -> Delta:
        """All that is pending, as one delta."""

def route(
    streams: dict[int, Any],
    request_ids: bytes,
    tokens: bytes,
    finishes: bytes,
    logprobs: dict[int, Any],
) -> list[int]:
    """Gives the entries of a step (messages.StepOutput) to their streams. Those that end leave
    `streams`; returns the ones that a stop string ended, of which the engine does not know."""
