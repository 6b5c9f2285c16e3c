"""A model as the service knows it: names, limits, tokenizer, template and the way to its engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from zllm.errors import Unavailable, UnknownModel
from zllm.runtime.chat_template import ChatTemplate
from zllm.runtime.messages import ModelCard
from zllm.runtime.tokenizer import Tokenizer
from zllm.service.engine_client import EngineClient
from zllm.v1 import models_pb2


@dataclass(frozen=True)
class ServedModel:
    name: str
    card: ModelCard
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    engine: EngineClient
    max_context_tokens: int
    """The engine's limit, or the KV pool's where that is smaller."""

    def to_message(self) -> models_pb2.Model:
        return models_pb2.Model(
            name=self.name,
            architectures=self.card.architectures,
            max_context_tokens=self.max_context_tokens,
            vocab_size=self.card.vocab_size,
            eos_token_ids=self.card.eos_token_ids,
            weight_format=self.card.weight_format,
        )


@dataclass
class Models:
    """The served models by name; the first is the default."""

    by_name: dict[str, ServedModel] = field(default_factory=dict)

    def add(self, model: ServedModel) -> None:
        self.by_name[model.name] = model

    def find(self, name: str, field: str = "model") -> ServedModel:
        """The model of that name, or the first where `name` is empty. Raises UnknownModel, and
        Unavailable while none is loaded."""
        if not self.by_name:
            raise Unavailable("the model is still loading")
        if not name:
            return next(iter(self.by_name.values()))
        model = self.by_name.get(name)
        if model is None:
            served = ", ".join(self.by_name)
            raise UnknownModel(field, f"{name[:200]!r} is not served here; served: {served}")
        return model
