"""ModelService: what is served, and its tokenizer."""

from __future__ import annotations

from zllm.errors import InvalidRequest
from zllm.service.prompts import encode_text
from zllm.service.rpc import Context
from zllm.service.served_model import Models
from zllm.service.tenants import current_caller
from zllm.service.validation import Check
from zllm.v1 import models_pb2

MAX_DETOKENIZE_IDS = 1_000_000


class ModelService:
    def __init__(self, models: Models) -> None:
        self._models = models

    async def ListModels(
        self, request: models_pb2.ListModelsRequest, context: Context
    ) -> models_pb2.ListModelsResponse:
        visible = current_caller().visible(self._models)
        served = [model.to_message() for model in visible.by_name.values()]
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
        ids = await encode_text(model, request.text, add_special_tokens=request.add_special_tokens)
        return models_pb2.TokenizeResponse(
            ids=ids, tokens=[model.tokenizer.token_bytes(token_id) for token_id in ids]
        )

    async def Detokenize(
        self, request: models_pb2.DetokenizeRequest, context: Context
    ) -> models_pb2.DetokenizeResponse:
        model = current_caller().find(self._models, request.model)
        if len(request.ids) > MAX_DETOKENIZE_IDS:
            raise InvalidRequest("ids", f"{len(request.ids)} ids; at most {MAX_DETOKENIZE_IDS} go")
        check = Check()
        check.ids("ids", request.ids, model.card.vocab_size)
        check.done()
        text = model.tokenizer.decode(
            list(request.ids), skip_special_tokens=request.skip_special_tokens
        )
        return models_pb2.DetokenizeResponse(text=text)
