"""From a request's prompt to token ids: tokenize text, render chat, take ids as they are.

Work that grows with the prompt runs in a thread, so that no running stream waits for it.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct

from zllm.errors import InvalidRequest
from zllm.service.served_model import ServedModel
from zllm.service.validation import Check, check_text
from zllm.v1 import generation_pb2

INLINE_CHARS = 2048
"""Text that is tokenized faster than a thread is woken."""


async def prompt_ids(request: generation_pb2.GenerateRequest, model: ServedModel) -> list[int]:
    """Raises InvalidRequest for a chat that the model's template refuses, and for a text with a
    token that the model's weights do not have."""
    kind = request.WhichOneof("prompt")
    if kind == "token_ids":
        return list(request.token_ids.ids)
    if kind == "text":
        ids = await encode_text(model, request.text, add_special_tokens=True)
        return _embedded("text", ids, model)
    text = await asyncio.to_thread(_render, request.chat, model)
    check = Check()
    check_text(check, "chat", len(text), model)
    check.done()
    # The template writes the special tokens itself.
    ids = await encode_text(model, text, add_special_tokens=False)
    return _embedded("chat", ids, model)


def _embedded(field: str, ids: list[int], model: ServedModel) -> list[int]:
    """The ids, if the model has an embedding for each: tokens may have been added to its tokenizer
    alone, and the engine ends at an id outside of the table."""
    size = model.card.vocab_size
    if model.tokenizer.vocab_size > size and (worst := max(ids, default=0)) >= size:
        written = model.tokenizer.token_bytes(worst).decode("utf-8", "replace")
        raise InvalidRequest(
            field, f"token {worst}, {written[:100]!r}, is outside the model's vocabulary of {size}"
        )
    return ids


async def encode_text(model: ServedModel, text: str, *, add_special_tokens: bool) -> list[int]:
    encode = model.tokenizer.encode
    if len(text) <= INLINE_CHARS:
        return encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(encode, text, add_special_tokens=add_special_tokens)


def _render(chat: generation_pb2.Chat, model: ServedModel) -> str:
    template = model.chat_template
    if template is None:
        raise InvalidRequest("chat", f"model {model.name} has no chat template: send text instead")
    try:
        return template.render(
            [{"role": message.role, "content": message.content} for message in chat.messages],
            tools=_tools(chat.tools_json),
            variables=_variables(chat.template_kwargs),
        )
    except RecursionError:
        raise InvalidRequest("chat", "tools_json or template_kwargs is nested too deep") from None


def _variables(given: Struct) -> dict[str, Any]:
    try:
        return json_format.MessageToDict(given)
    except ValueError as error:
        # JSON has neither NaN nor infinities.
        raise InvalidRequest("chat.template_kwargs", f"it is no JSON: {error}") from None


def _tools(tools_json: str) -> list[Any] | None:
    if not tools_json:
        return None
    try:
        tools = json.loads(tools_json)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("chat.tools_json", f"it is not JSON: {error}") from None
    if not isinstance(tools, list):
        raise InvalidRequest("chat.tools_json", "it is JSON, but not an array of tools")
    return tools
