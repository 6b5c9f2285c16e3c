"""ModelService: what is served, and its tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from zllm.service.prompts import encode_text
from zllm.service.rpc import Context
from zllm.service.served_model import Models
from zllm.service.tenants import current_caller
from zllm.service.validation import Check, check_ids, check_text
from zllm.v1 import models_pb2

INLINE_TOKENS = 2048

Result = TypeVar("Result")


class ModelService:
    def __init__(self, models: Models) -> None:
        self._models = models

    async def ListModels(
        self, request: models_pb2.ListModelsRequest, context: Context
    ) -> models_pb2.ListModelsResponse:
        visible = current_caller().visible(self._models)
        served = [model.to_message() for model in visible.served]
        return models_pb2.ListModelsResponse(models=served)

    async def GetModel(
        self, request: models_pb2.GetModelRequest, context: Context
    ) -> models_pb2.GetModelResponse:
        return models_pb2.GetModelResponse(
            model=current_caller().find(self._models, request.name, "name").to_message()
        )

    async def Tokenize(
        self, request: models_pb2.TokenizeRequest, context: Context
    ) -> models_pb2.TokenizeResponse:
        model = current_caller().find(self._models, request.model)
        check = Check()
        check_text(check, "text", len(request.text), model)
        check.done()
        ids = await encode_text(model, request.text, add_special_tokens=request.add_special_tokens)
        return await _maybe_in_thread(
            len(ids),
            lambda: models_pb2.TokenizeResponse(
                ids=ids, tokens=[model.tokenizer.token_bytes(token_id) for token_id in ids]
            ),
        )

    async def Detokenize(
        self, request: models_pb2.DetokenizeRequest, context: Context
    ) -> models_pb2.DetokenizeResponse:
        model = current_caller().find(self._models, request.model)
        check = Check()
        check_ids(check, "ids", request.ids, model)
        check.done()
        text = await _maybe_in_thread(
            len(request.ids),
            lambda: model.tokenizer.decode(
                request.ids, skip_special_tokens=request.skip_special_tokens
            ),
        )
        return models_pb2.DetokenizeResponse(text=text)


async def _maybe_in_thread(count: int, work: Callable[[], Result]) -> Result:
    """Work on so many tokens, in a thread where running streams would wait for it."""
    return await asyncio.to_thread(work) if count > INLINE_TOKENS else work()
