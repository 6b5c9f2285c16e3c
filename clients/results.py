"""What the clients give back: frozen, plain Python."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from zllm.v1 import generation_pb2, models_pb2, types_pb2


@dataclass(frozen=True)
class Logprob:
    """One chosen token, how likely it was (natural log; rank 1 is best), and the likeliest."""

    token_id: int
    logprob: float
    rank: int
    token: bytes
    top: tuple[tuple[int, float, bytes], ...] = ()
    """(token id, logprob, bytes), best first."""


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Timing:
    """Seconds, as the server saw them."""

    queued: float
    first_token: float
    total: float


@dataclass(frozen=True)
class Delta:
    """What a stream gained. `finish_reason` is None until the last one."""

    text: str
    token_ids: tuple[int, ...]
    num_tokens: int
    logprobs: tuple[Logprob, ...]
    finish_reason: str | None
    """eos, stop, length, context_limit, time_limit, aborted or shutdown."""
    stop: str | int | None
    """The stop string or token id that matched."""


@dataclass(frozen=True)
class Completion:
    """One whole answer."""

    request_id: str
    model: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    finish_reason: str
    stop: str | int | None
    cumulative_logprob: float | None
    prompt_token_ids: tuple[int, ...]
    usage: Usage
    timing: Timing


@dataclass(frozen=True)
class ModelInfo:
    name: str
    architectures: tuple[str, ...]
    max_context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    weight_format: str


def finish_name(reason: int) -> str:
    name = types_pb2.FinishReason.Name(reason)
    return str(name).removeprefix("FINISH_REASON_").lower()


def read_delta(message: generation_pb2.SequenceDelta) -> Delta:
    return Delta(
        text=message.text,
        token_ids=tuple(message.token_ids),
        num_tokens=message.num_tokens,
        logprobs=_logprobs(message.logprobs),
        finish_reason=finish_name(message.finish.reason) if message.HasField("finish") else None,
        stop=_stop(message.finish),
    )


def read_completion(message: generation_pb2.GenerateResponse) -> Completion:
    output = message.outputs[0]
    has_score = output.HasField("cumulative_logprob")
    return Completion(
        request_id=message.request_id,
        model=message.model,
        text=output.text,
        token_ids=tuple(output.token_ids),
        logprobs=_logprobs(output.logprobs),
        finish_reason=finish_name(output.finish.reason),
        stop=_stop(output.finish),
        cumulative_logprob=output.cumulative_logprob if has_score else None,
        prompt_token_ids=tuple(message.prompt.token_ids),
        usage=read_usage(message.usage),
        timing=read_timing(message.timing),
    )


def read_usage(message: types_pb2.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.cached_tokens, message.completion_tokens)


def read_timing(message: generation_pb2.Timing) -> Timing:
    parts = (message.queued, message.first_token, message.total)
    return Timing(*(part.ToNanoseconds() / 1e9 for part in parts))


def read_model(message: models_pb2.Model) -> ModelInfo:
    return ModelInfo(
        name=message.name,
        architectures=tuple(message.architectures),
        max_context_tokens=message.max_context_tokens,
        vocab_size=message.vocab_size,
        eos_token_ids=tuple(message.eos_token_ids),
        weight_format=message.weight_format,
    )


def _stop(finish: generation_pb2.SequenceFinish) -> str | int | None:
    matched = finish.WhichOneof("matched")
    return None if matched is None else getattr(finish, matched)


def _logprobs(entries: Iterable[types_pb2.TokenLogprob]) -> tuple[Logprob, ...]:
    return tuple(
        Logprob(
            token_id=entry.token_id,
            logprob=entry.logprob,
            rank=entry.rank,
            token=entry.token,
            top=tuple((top.token_id, top.logprob, top.token) for top in entry.top),
        )
        for entry in entries
    )
