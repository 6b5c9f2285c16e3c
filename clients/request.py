"""Builds a GenerateRequest from plain Python: what both clients share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.duration_pb2 import Duration

from zllm.errors import InvalidRequest
from zllm.v1 import generation_pb2

Message = Mapping[str, str]
"""One turn of a chat: {"role": ..., "content": ...}."""
Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids or the messages of a chat."""

_SAMPLING = {field.name for field in generation_pb2.SamplingParams.DESCRIPTOR.fields}
_STOPPING = {field.name for field in generation_pb2.StoppingParams.DESCRIPTOR.fields}
_OUTPUT = {field.name for field in generation_pb2.OutputOptions.DESCRIPTOR.fields} - {"text"}
_TOP = {"request_id", "model", "priority", "truncate_prompt_tokens", "beam_search", "constraint"}
_DURATIONS = {"time_limit", "queue_timeout"}


def build_request(prompt: Prompt, **options: Any) -> generation_pb2.GenerateRequest:
    """`options` are the contract's field names, flat: temperature, max_tokens, stop_strings,
    logprobs … Times are in seconds. Besides: `stop` (one string or several), `text` (False: no
    text back), `cache_salt`, `bypass_cache`, `tools`, `template_kwargs`.
    Raises TypeError for a name or a type that the contract does not know, and for a chat's options
    beside another prompt; InvalidRequest for a value that its field cannot hold, and for a message
    without role or content."""
    request = generation_pb2.GenerateRequest()
    try:
        _set_prompt(request, prompt)
    except ValueError as error:  # half a surrogate pair, a negative id
        raise InvalidRequest("prompt", f"cannot be sent: {error}") from None
    stop = options.pop("stop", None)
    if stop is not None:
        request.stopping.stop_strings.extend([stop] if isinstance(stop, str) else stop)
    if "text" in options:
        request.output.text = options.pop("text")
    for name, value in options.items():
        if value is not None:
            try:
                _set_option(request, name, value)
            except (ValueError, OverflowError) as error:
                raise InvalidRequest(name, f"is {value!r}: {error}") from None
    return request


def _set_prompt(request: generation_pb2.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
        return
    for item in prompt:
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
        getattr(message, name).extend(value)
    elif field.message_type is not None:
        getattr(message, name).CopyFrom(value)
    else:
        setattr(message, name, value)
