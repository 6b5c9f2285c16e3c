"""Builds a GenerateRequest from plain Python: what both clients share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.duration_pb2 import Duration

from zllm.errors import InvalidRequest
from zllm.v1 import generation_pb2, models_pb2

Message = Mapping[str, str]
"""One turn of a chat: {"role": ..., "content": ...}."""
Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids or the messages of a chat."""

_SAMPLING = {field.name for field in generation_pb2.SamplingParams.DESCRIPTOR.fields}
_STOPPING = {field.name for field in generation_pb2.StoppingParams.DESCRIPTOR.fields}
_OUTPUT = {field.name for field in generation_pb2.OutputOptions.DESCRIPTOR.fields}
_TOP = {"request_id", "model", "priority", "truncate_prompt_tokens", "beam_search", "constraint"}
_DURATIONS = {"time_limit", "queue_timeout"}
_LONGEST_TIMEOUT = 1e9
"""Thirty years, in seconds."""


def build_request(prompt: Prompt, **options: Any) -> generation_pb2.GenerateRequest:
    """`options` are the contract's field names, flat: temperature, max_tokens, stop_strings,
    logprobs … Times are in seconds. Besides: `stop` (one string or several), `text` (False: no
    text back), `cache_salt`, `bypass_cache`, `tools`, `template_kwargs`.
    Raises TypeError for a name or a type that the contract does not know, for a chat's options
    beside another prompt and for a prompt of ids and messages; InvalidRequest for a value that its
    field cannot hold, and for a message without role or content."""
    request = generation_pb2.GenerateRequest()
    try:
        _set_prompt(request, prompt)
    except ValueError as error:  # half a surrogate pair, a negative id
        raise InvalidRequest("prompt", f"cannot be sent: {error}") from None
    for name, value in options.items():
        if value is not None:
            try:
                _set_option(request, name, value)
            except (ValueError, OverflowError) as error:
                raise InvalidRequest(name, f"is {value!r}: {error}") from None
    return request


def tokenize_request(text: str, model: str, add_special_tokens: bool) -> models_pb2.TokenizeRequest:
    try:
        return models_pb2.TokenizeRequest(
            model=model, text=text, add_special_tokens=add_special_tokens
        )
    except ValueError as error:
        raise InvalidRequest("text", f"cannot be sent: {error}") from None


def detokenize_request(
    ids: Sequence[int], model: str, skip_special_tokens: bool
) -> models_pb2.DetokenizeRequest:
    try:
        return models_pb2.DetokenizeRequest(
            model=model, ids=ids, skip_special_tokens=skip_special_tokens
        )
    except ValueError as error:
        raise InvalidRequest("ids", f"cannot be sent: {error}") from None


def deadline(timeout: float | None) -> float | None:
    """`timeout` as gRPC takes it: what its clock cannot hold, infinity too, it takes for passed."""
    if timeout is not None and math.isnan(timeout):
        raise InvalidRequest("timeout", "is nan: it must be a number of seconds, or None")
    return None if timeout is None or timeout > _LONGEST_TIMEOUT else timeout


def _set_prompt(request: generation_pb2.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
        return
    items: list[Any] = list(prompt)
    if len({isinstance(item, Mapping) for item in items}) > 1:
        # The field that is set last would be all that is sent.
        raise TypeError("the prompt has both token ids and messages: give one of them")
    for item in items:
        if isinstance(item, Mapping):
            if not {"role", "content"} <= item.keys():
                raise InvalidRequest("prompt", f"a message needs role and content, not {[*item]}")
            request.chat.messages.add(role=item["role"], content=item["content"])
        else:
            request.token_ids.ids.append(item)


def _set_option(request: generation_pb2.GenerateRequest, name: str, value: Any) -> None:
    if name in _SAMPLING:
        _assign(request.sampling, name, value)
    elif name in _STOPPING:
        _assign(request.stopping, name, value)
    elif name == "stop":
        _assign(request.stopping, "stop_strings", value)
    elif name in _OUTPUT:
        _assign(request.output, name, value)
    elif name in _TOP or name in _DURATIONS:
        _assign(request, name, value)
    elif name == "cache_salt":
        request.cache.salt = value
    elif name == "bypass_cache":
        request.cache.bypass = value
    elif name in ("tools", "template_kwargs") and request.WhichOneof("prompt") != "chat":
        raise TypeError(f"{name!r} is of a chat: the prompt must be its messages")
    elif name == "tools":
        request.chat.tools_json = json.dumps(value)
    elif name == "template_kwargs":
        request.chat.template_kwargs.update(value)
    else:
        raise TypeError(f"{name!r} is no option of a generation request")


def _assign(message: Any, name: str, value: Any) -> None:
    field = message.DESCRIPTOR.fields_by_name[name]
    if name in _DURATIONS:
        duration = Duration()
        duration.FromNanoseconds(round(value * 1e9))
        getattr(message, name).CopyFrom(duration)
    elif field.is_repeated and field.message_type is not None:
        getattr(message, name).update(value)
    elif field.is_repeated:
        # One string need not be in a list, and is not one of its letters.
        getattr(message, name).extend([value] if isinstance(value, str) else value)
    elif field.message_type is not None:
        getattr(message, name).CopyFrom(value)
    else:
        setattr(message, name, value)
