"""What `LLM` gives back, with vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass, field

from zllm.runtime.messages import TokenLogprobs


@dataclass(slots=True)
class CompletionOutput:
    """One sequence."""

    index: int = 0
    text: str = ""
    """Empty where the model has no tokenizer."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    """One a token; None where none were asked for."""
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    """eos, stop, length, context_limit; error: the model's logits were not finite."""
    stop_reason: int | str | None = None
    """The stop token's id or the stop string that matched."""


@dataclass(slots=True)
class RequestOutput:
    """One prompt and what became of it."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    num_cached_tokens: int = 0
