"""Checks every field of a request before the engine hears of it.

Violations are collected, so that a client learns of all of them at once.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from zllm.errors import InvalidRequest, UnsupportedRequest
from zllm.runtime.messages import ModelCard, Sampling, Stopping
from zllm.runtime.sampling_params import MAX_LOGPROBS, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS
from zllm.service.served_model import ServedModel
from zllm.service.status import BadFields
from zllm.v1 import generation_pb2

MAX_STOP_STRING_CHARS = 1024
MAX_REQUEST_ID_CHARS = 256
MAX_SALT_CHARS = 256
MAX_CHAT_MESSAGES = 4096
MAX_IDS = 2**20
MAX_CHARS = 2**20
"""Of a text, and bytes of a chat. Both hold for contexts up to that length; a longer one takes as
many ids as it has tokens, and CHARS_A_TOKEN as many characters."""
CHARS_A_TOKEN = 16
MAX_SECONDS = 366 * 24 * 3600.0


@dataclass(frozen=True)
class Options:
    """A request's checked fields, apart from its prompt."""

    sampling: Sampling
    max_tokens: int | None
    stopping: Stopping
    stop_strings: tuple[str, ...]
    num_logprobs: int
    queue_timeout: float
    min_tokens_per_delta: int


class Check:
    """Collects what is wrong with a request."""

    def __init__(self) -> None:
        self.violations: list[InvalidRequest] = []

    def wrong(self, field: str, reason: str) -> None:
        self.violations.append(InvalidRequest(field, reason))

    def number(
        self, field: str, value: float, low: float, high: float, *, open_low: bool = False
    ) -> None:
        inside = (low < value if open_low else low <= value) and value <= high
        if not inside:
            start = "(" if open_low else "["
            end = ")" if math.isinf(high) else "]"
            self.wrong(field, f"{value:g} is not in {start}{low:g}, {high:g}{end}")

    def seconds(self, field: str, value: Duration) -> float:
        seconds = value.seconds + value.nanos / 1e9
        if not 0 < seconds <= MAX_SECONDS:
            self.wrong(field, f"{seconds:g} s is not a time above 0 and up to a year")
        return seconds

    def ids(self, field: str, ids: Sequence[int], vocab_size: int) -> None:
        if not ids or max(ids) < vocab_size:
            return
        for index, token_id in enumerate(ids):
            if token_id >= vocab_size:
                self.wrong(
                    f"{field}[{index}]",
                    f"token id {token_id} is outside the vocabulary of {vocab_size}",
                )
                return

    def done(self) -> None:
        """Raises BadFields when anything was wrong."""
        if self.violations:
            raise BadFields(self.violations)


def check_options(
    request: generation_pb2.GenerateRequest, model: ServedModel, server_queue_timeout: float
) -> Options:
    """Raises UnsupportedRequest for a field that a later version builds, BadFields for values."""
    refuse_unsupported(request)
    check = Check()
    if len(request.request_id) > MAX_REQUEST_ID_CHARS:
        count = len(request.request_id)
        check.wrong("request_id", f"{count} characters; at most {MAX_REQUEST_ID_CHARS} go")
    if len(request.cache.salt) > MAX_SALT_CHARS:
        count = len(request.cache.salt)
        check.wrong("cache.salt", f"{count} characters; at most {MAX_SALT_CHARS} go")
    sampling = _sampling(check, request.sampling, model.card)
    stopping = _stopping(check, request.stopping, model)
    output = request.output
    num_logprobs = output.logprobs if output.HasField("logprobs") else -1
    if num_logprobs > MAX_LOGPROBS:
        check.wrong("output.logprobs", f"{num_logprobs} is not in [0, {MAX_LOGPROBS}]")
    if output.HasField("min_tokens_per_delta") and output.min_tokens_per_delta < 1:
        check.wrong("output.min_tokens_per_delta", "it is 0; it must be at least 1")
    queue_timeout = server_queue_timeout
    if request.HasField("queue_timeout"):
        queue_timeout = check.seconds("queue_timeout", request.queue_timeout)
    if request.HasField("truncate_prompt_tokens") and request.truncate_prompt_tokens < 1:
        check.wrong("truncate_prompt_tokens", "it is 0; it must be at least 1")
    _prompt_fields(check, request, model)
    check.done()
    return Options(
        sampling=sampling,
        max_tokens=stopping.max_tokens or None,
        stopping=stopping,
        stop_strings=tuple(request.stopping.stop_strings),
        num_logprobs=num_logprobs,
        queue_timeout=queue_timeout,
        min_tokens_per_delta=output.min_tokens_per_delta or 1,
    )


def fit_prompt(
    request: generation_pb2.GenerateRequest,
    prompt: list[int],
    options: Options,
    context: int,
    max_prompt_tokens: int = 0,
) -> tuple[list[int], Stopping]:
    """The prompt after truncation, and the stopping rules with max_tokens settled.
    Raises BadFields where prompt and output do not fit the context, or the prompt not the
    server's own limit (0: none)."""
    check = Check()
    field = request.WhichOneof("prompt") or "prompt"
    if request.HasField("truncate_prompt_tokens"):
        prompt = prompt[-request.truncate_prompt_tokens :]
    if not prompt:
        check.wrong(field, "the prompt has no tokens")
    elif len(prompt) >= context:
        check.wrong(
            field,
            f"the prompt has {len(prompt)} tokens and the context {context}, one of them for the "
            "output: shorten it or set truncate_prompt_tokens",
        )
    elif 0 < max_prompt_tokens < len(prompt):
        check.wrong(
            field,
            f"the prompt has {len(prompt)} tokens and this server takes {max_prompt_tokens}: "
            "shorten it or set truncate_prompt_tokens",
        )
    fits = 0 < len(prompt) < context
    room = context - len(prompt) if fits else context
    wanted = options.max_tokens
    if wanted is not None and wanted > room:
        check.wrong(
            "stopping.max_tokens",
            f"{wanted} tokens and a prompt of {len(prompt)} exceed the context of {context}: "
            "ask for fewer, or leave it out",
        )
    check.done()
    stopping = options.stopping
    return prompt, Stopping(
        max_tokens=wanted or context,  # more than fits: the engine ends it, and says why
        min_tokens=stopping.min_tokens,
        eos_token_ids=stopping.eos_token_ids,
        stop_token_ids=stopping.stop_token_ids,
        time_limit=stopping.time_limit,
    )


def refuse_unsupported(request: generation_pb2.GenerateRequest) -> None:
    """Values that ask for nothing (a penalty of 0, one sequence) pass."""
    sampling = request.sampling
    asked = {
        "sampling.presence_penalty": sampling.presence_penalty != 0,
        "sampling.frequency_penalty": sampling.frequency_penalty != 0,
        "sampling.repetition_penalty": sampling.HasField("repetition_penalty")
        and sampling.repetition_penalty != 1,
        "sampling.num_sequences": sampling.num_sequences > 1,
        "sampling.logit_bias": bool(sampling.logit_bias),
        "sampling.allowed_token_ids": bool(sampling.allowed_token_ids),
        "beam_search": request.HasField("beam_search"),
        "constraint": request.HasField("constraint"),
        "output.prompt_logprobs": request.output.HasField("prompt_logprobs"),
    }
    for field, wanted in asked.items():
        if wanted:
            raise UnsupportedRequest(field, "this server does not implement it yet")


def _sampling(check: Check, params: generation_pb2.SamplingParams, model: ModelCard) -> Sampling:
    """Unset: the model's own default, then the contract's."""

    def given(name: str, default: float) -> float:
        if params.HasField(name):
            return float(getattr(params, name))
        own = getattr(model, name)
        return default if own is None else float(own)

    temperature = given("temperature", 1.0)
    top_p = given("top_p", 1.0)
    top_k = int(given("top_k", 0))
    min_p = given("min_p", 0.0)
    check.number("sampling.temperature", temperature, 0.0, 100.0)
    check.number("sampling.top_p", top_p, 0.0, 1.0, open_low=True)
    check.number("sampling.min_p", min_p, 0.0, 1.0)
    check.number("sampling.top_k", top_k, 0, 2**31 - 1)
    if params.HasField("num_sequences") and params.num_sequences < 1:
        check.wrong("sampling.num_sequences", "it is 0; it must be at least 1")
    seed = params.seed if params.HasField("seed") else secrets.randbits(64)
    return Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)


def _stopping(check: Check, params: generation_pb2.StoppingParams, model: ServedModel) -> Stopping:
    """max_tokens is 0 where the request leaves it to the context."""
    max_tokens = 0
    if params.HasField("max_tokens"):
        max_tokens = params.max_tokens
        if max_tokens < 1:
            check.wrong("stopping.max_tokens", "it is 0; it must be at least 1")
    min_tokens = params.min_tokens
    if min_tokens > (max_tokens or model.max_context_tokens):
        check.wrong("stopping.min_tokens", f"{min_tokens} is more than the output may have")
    if len(params.stop_strings) > MAX_STOP_STRINGS:
        count = len(params.stop_strings)
        check.wrong("stopping.stop_strings", f"{count} strings; at most {MAX_STOP_STRINGS} go")
    else:
        for index, stop in enumerate(params.stop_strings):
            if not 1 <= len(stop) <= MAX_STOP_STRING_CHARS:
                check.wrong(
                    f"stopping.stop_strings[{index}]",
                    f"it has {len(stop)} characters, not 1 to {MAX_STOP_STRING_CHARS}",
                )
    stop_token_ids: tuple[int, ...] = ()
    if len(params.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        count = len(params.stop_token_ids)
        check.wrong("stopping.stop_token_ids", f"{count} ids; at most {MAX_STOP_TOKEN_IDS} go")
    else:
        stop_token_ids = tuple(params.stop_token_ids)
        check.ids("stopping.stop_token_ids", stop_token_ids, model.card.vocab_size)
    time_limit = 0.0
    if params.HasField("time_limit"):
        time_limit = check.seconds("stopping.time_limit", params.time_limit)
    return Stopping(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        eos_token_ids=() if params.ignore_eos else model.card.eos_token_ids,
        stop_token_ids=stop_token_ids,
        time_limit=time_limit,
    )


def _prompt_fields(
    check: Check, request: generation_pb2.GenerateRequest, model: ServedModel
) -> None:
    kind = request.WhichOneof("prompt")
    if kind is None:
        check.wrong("prompt", "the request has none: set text, token_ids or chat")
    elif kind == "token_ids":
        check_ids(check, "token_ids.ids", request.token_ids.ids, model)
    elif kind == "text":
        check_text(check, "text", len(request.text), model)
    elif check_text(check, "chat", request.chat.ByteSize(), model):
        if model.chat_template is None:
            check.wrong("chat", f"model {model.name} has no chat template: send text instead")
        if not 1 <= len(request.chat.messages) <= MAX_CHAT_MESSAGES:
            check.wrong("chat.messages", f"there must be 1 to {MAX_CHAT_MESSAGES} messages")
            return
        for index, message in enumerate(request.chat.messages):
            if not message.role:
                check.wrong(f"chat.messages[{index}].role", "it is empty")


def check_ids(check: Check, field: str, ids: Sequence[int], model: ServedModel) -> None:
    """Their number, and only where that is bearable each of them."""
    most = max(MAX_IDS, model.max_context_tokens)
    if len(ids) > most:
        check.wrong(field, f"{len(ids)} ids; at most {most} go")
    else:
        check.ids(field, ids, model.card.vocab_size)


def check_text(check: Check, field: str, size: int, model: ServedModel) -> bool:
    """Whether a text of this size may be rendered and tokenized: that takes time in proportion,
    which no other request is to pay for."""
    most = max(MAX_CHARS, CHARS_A_TOKEN * model.max_context_tokens)
    if size > most:
        check.wrong(field, f"it has a size of {size}, and {most} at most goes: shorten it")
    return size <= most
