"""One line a request, at its end: who asked whom, how it went, and how long each part took."""

from __future__ import annotations

import logging
from typing import Any

from zllm.errors import Overloaded, RequestError, Unavailable
from zllm.service.calls import Call
from zllm.v1 import generation_pb2

log = logging.getLogger(__name__)

LOGGED = "zllm.v1.GenerationService/"


class RequestLog:
    """Hears of calls (calls.Observer). An error is named by its code, field and cause alone,
    since its text may quote the request; prompts and answers are only told under `prompts`."""

    def __init__(self, prompts: bool = False) -> None:
        self._prompts = prompts

    def first_token(self, call: Call) -> None:
        if self._prompts and call.stream is not None:
            call.stream.taken = []

    def ended(self, call: Call) -> None:
        if not (call.method.startswith(LOGGED) and log.isEnabledFor(logging.INFO)):
            return
        fields = _fields(call)
        if self._prompts and call.request is not None:
            fields["prompt"] = _prompt(call.request)
            fields["output"] = "".join((call.stream and call.stream.taken) or ())
        log.info("request", extra={key: value for key, value in fields.items() if value != ""})


def _fields(call: Call) -> dict[str, Any]:
    stream, error = call.stream, call.error
    fields: dict[str, Any] = {
        "request_id": call.request_id,
        "tenant": call.tenant,
        "model": call.model,
        "method": call.method.removeprefix(LOGGED),
        "code": call.code.name,
        "finish_reason": call.finish_reason or "",
        "field": error.field if isinstance(error, RequestError) else "",
        "cause": error.cause if isinstance(error, (Overloaded, Unavailable)) else "",
        "prompt_tokens": len(call.prompt),
        "cached_tokens": stream.cached_tokens if stream is not None else 0,
        "output_tokens": stream.produced_tokens if stream is not None else 0,
        "e2e_latency": round(call.latency, 6),
    }
    if call.queue_time is not None and call.time_to_first_token is not None:
        fields["queue_time"] = round(call.queue_time, 6)
        fields["time_to_first_token"] = round(call.time_to_first_token, 6)
    return fields


def _prompt(request: generation_pb2.GenerateRequest) -> Any:
    kind = request.WhichOneof("prompt")
    if kind == "token_ids":
        return list(request.token_ids.ids)
    if kind == "chat":
        return [{"role": each.role, "content": each.content} for each in request.chat.messages]
    return request.text
