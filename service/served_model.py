"""A model as the service knows it: names, limits, tokenizer, template and the way to its engine."""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass
class Models:
    """The served models by name; the first is the default. `loading` are those that will come."""

    by_name: dict[str, ServedModel] = field(default_factory=dict)
    loading: set[str] = field(default_factory=set)

    def add(self, model: ServedModel) -> None:
        self.by_name[model.name] = model
        self.loading.discard(model.name)

    def remove(self, name: str) -> ServedModel | None:
        """Forgets the name; returns the model that it was, if it was loaded."""
        self.loading.discard(name)
        return self.by_name.pop(name, None)

    @property
    def default(self) -> str:
        """What an empty name means; empty where no model is served yet."""
        return next(iter(self.by_name), "")

    def knows(self, name: str) -> bool:
        """Whether a model of that name is served or loading."""
        return name in self.by_name or name in self.loading

    def only(self, names: frozenset[str]) -> Models:
        """Those of these names."""
        served = {name: model for name, model in self.by_name.items() if name in names}
        return Models(served, self.loading & names)

    def find(self, name: str, field: str = "model") -> ServedModel:
        """The model of that name, or the first where `name` is empty. Raises UnknownModel, and
        Unavailable while it is loading."""
        model = self.by_name.get(name or self.default)
        if model is not None:
            return model
        if name in self.loading or (not name and self.loading):
            raise Unavailable("the model is still loading")
        served = ", ".join(self.by_name) or "no model"
        raise UnknownModel(field, f"{name[:200]!r} is not served here; served: {served}")
