"""A model as the service knows it: names, limits, tokenizer, template and the way to its engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zllm.errors import Unavailable, UnknownModel
from zllm.runtime.chat_template import ChatTemplate
from zllm.runtime.messages import ModelCard
from zllm.runtime.tokenizer import Tokenizer
from zllm.service.engine_client import EngineClient
from zllm.v1 import models_pb2


@dataclass(frozen=True, kw_only=True)
class RunningModel:
    """A model whose engine is ready."""

    name: str
    card: ModelCard
    engine: EngineClient
    max_context_tokens: int
    """The engine's limit, or the KV pool's where that is smaller."""
    restarts: int = 0
    """Engines that took the place of a lost one."""

    def to_message(self) -> models_pb2.Model:
        return models_pb2.Model(
            name=self.name,
            architectures=self.card.architectures,
            max_context_tokens=self.max_context_tokens,
            vocab_size=self.card.vocab_size,
            eos_token_ids=self.card.eos_token_ids,
            weight_format=self.card.weight_format,
        )


@dataclass(frozen=True, kw_only=True)
class ServedModel(RunningModel):
    """With what turns its text into tokens and back."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None


class Models:
    """The models that are served or will be, by name, in the order in which they were expected; the
    first is the default."""

    def __init__(self, models: Mapping[str, ServedModel | None]) -> None:
        self._models = dict(models)

    @property
    def served(self) -> list[ServedModel]:
        return [model for model in self._models.values() if model is not None]

    @property
    def default(self) -> str:
        """What an empty name means; empty where there is no model."""
        return next(iter(self._models), "")

    def __contains__(self, name: str) -> bool:
        """Whether a model of that name is served or will be."""
        return name in self._models

    def get(self, name: str) -> ServedModel | None:
        return self._models.get(name)

    def expect(self, name: str) -> None:
        self._models.setdefault(name, None)

    def add(self, model: ServedModel) -> None:
        self._models[model.name] = model

    def remove(self, name: str) -> ServedModel | None:
        """Forgets the name; returns the model that it was, if it was loaded."""
        return self._models.pop(name, None)

    def only(self, names: frozenset[str]) -> Models:
        """Those of these names."""
        return Models({name: model for name, model in self._models.items() if name in names})

    def find(self, name: str, field: str = "model") -> ServedModel:
        """The model of that name, or the first where `name` is empty. Raises UnknownModel, and
        Unavailable while it is loading."""
        name = name or self.default
        model = self.get(name)
        if model is not None:
            return model
        if name in self:
            raise Unavailable("the model is still loading")
        served = ", ".join(model.name for model in self.served) or "no model"
        raise UnknownModel(field, f"{name[:200]!r} is not served here; served: {served}")
