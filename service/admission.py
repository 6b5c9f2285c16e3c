"""Whether a request that passed validation goes to its engine.

The queue's bounds are the engine's to keep, as it alone sees what all frontends sent: it refuses
what has no room. Deadlines are looked at here.
"""

from __future__ import annotations

from zllm.errors import DeadlineExceeded, Overloaded
from zllm.service.engine_client import EngineClient


def check_deadline(
    engine: EngineClient, prompt_tokens: int, left: float | None, *, slo: bool
) -> None:
    """`left` are the seconds to the deadline; None: there is none. Raises DeadlineExceeded for
    one that has passed, and with `slo` Overloaded where the first token would come too late."""
    if left is None:
        return
    if left <= 0:
        raise DeadlineExceeded("the deadline had passed before the request reached the engine")
    if not slo:
        return
    needed = engine.time_to_first_token(prompt_tokens)
    if needed > left:
        raise Overloaded(
            f"the first token is expected in {needed:.2f} s, and the deadline is in {left:.2f} s: "
            "allow more time, or try again later",
            engine.queue.retry_after(engine.load),
            cause="deadline",
        )
