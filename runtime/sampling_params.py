"""SamplingParams: what a caller of `LLM` asks for, with vLLM's names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from zllm.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_TOKEN_IDS = 1024
_SEED_LIMIT = 2**64
_NUMBERS = (
    "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "min_tokens", "logprobs",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. None: the model's default, else the comment's.

    Raises InvalidRequest, with the field's path in zllm.v1.GenerateRequest.
    """

    temperature: float | None = None
    """1.0, in [0, 100]; 0 is greedy."""
    top_p: float | None = None
    """1.0, in (0, 1]."""
    top_k: int | None = None
    """0: off. -1 is taken for 0."""
    min_p: float | None = None
    """0.0, in [0, 1]."""
    seed: int | None = None
    """Unsigned 64 bits. None: drawn anew for each prompt."""
    max_tokens: int | None = 16
    """None: to the end of the context."""
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none. 0: the chosen token's. N: also the N most likely."""
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        given = (self.stop,) if isinstance(self.stop, str) else self.stop
        stop = _as_tuple("stopping.stop_strings", given)
        object.__setattr__(self, "stop", stop)
        ids = _as_tuple("stopping.stop_token_ids", self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", tuple(map(_plain, ids)))
        for name in _NUMBERS:
            object.__setattr__(self, name, _plain(getattr(self, name)))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        _check_number("sampling.temperature", self.temperature, 0.0, 100.0)
        _check_number("sampling.top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise InvalidRequest("sampling.top_p", "is 0: it must be in (0, 1]")
        _check_number("sampling.min_p", self.min_p, 0.0, 1.0)
        _check_integer("sampling.top_k", self.top_k, 0, 2**31 - 1)
        _check_integer("sampling.seed", self.seed, 0, _SEED_LIMIT - 1)
        _check_integer("stopping.max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_integer("stopping.min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                "stopping.min_tokens",
                f"is {self.min_tokens}: it must be at most max_tokens ({self.max_tokens})",
            )
        _check_integer("output.logprobs", self.logprobs, 0, MAX_LOGPROBS)
        self._check_stops(stop)

    def _check_stops(self, stop: tuple[str, ...]) -> None:
        if len(stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(
                "stopping.stop_strings", f"has {len(stop)} items: at most {MAX_STOP_STRINGS}"
            )
        for index, text in enumerate(stop):
            if not isinstance(text, str) or not text:
                raise InvalidRequest(
                    f"stopping.stop_strings[{index}]", f"is {text!r}: it must be a text, not empty"
                )
        count = len(self.stop_token_ids)
        if count > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(
                "stopping.stop_token_ids", f"has {count} items: at most {MAX_STOP_TOKEN_IDS}"
            )
        for index, token in enumerate(self.stop_token_ids):
            _check_integer(f"stopping.stop_token_ids[{index}]", token, 0, 2**31 - 1)


def _as_tuple(field: str, values: Any) -> tuple[Any, ...]:
    """None is none."""
    try:
        return () if values is None else tuple(values)
    except TypeError:
        raise InvalidRequest(field, f"is {values!r}: it must be a list") from None


def _plain(value: Any) -> Any:
    """Numbers of other kinds, such as NumPy's, as Python's own; all else as it is."""
    if isinstance(value, (int, float)) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _check_number(field: str, value: float | None, low: float, high: float) -> None:
    """NaN and infinity are in no range."""
    if value is None:
        return
    allowed = f"it must be a number in [{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequest(field, f"is {value!r}: {allowed}")
    if not math.isfinite(value) or not low <= value <= high:
        raise InvalidRequest(field, f"is {value}: {allowed}")


def _check_integer(field: str, value: int | None, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(field, f"is {value!r}: it must be an integer in [{low}, {high}]")
