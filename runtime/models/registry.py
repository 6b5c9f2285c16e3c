"""Which class serves which architecture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from zllm.runtime.kv_cache import KVCache
from zllm.runtime.model_config import ModelConfig
from zllm.runtime.models.architectures import require_supported
from zllm.runtime.models.parameters import Parameter, Weights
from zllm.runtime.models.qwen3 import Qwen3
from zllm.runtime.ops import Batch, Hidden, Logits, Ops


class Model(Protocol):
    """A decoder. Neither call waits for the device, so both may be captured in a CUDA graph."""

    def __init__(
        self, config: ModelConfig, weights: Weights, max_model_len: int, device: torch.device
    ) -> None: ...

    @staticmethod
    def parameters(config: ModelConfig) -> Iterator[Parameter]:
        """All weights of the model."""
        ...

    final_norm: Tensor
    """[H]."""

    def forward(self, ops: Ops, batch: Batch, cache: KVCache, out: Tensor | None = None) -> Hidden:
        """Write the step's keys and values to the cache; give the sampled tokens' hidden states
        [S, H] in front of the last norm, in `out` where it is given, unless `batch.all_sample`."""
        ...

    def logits(self, ops: Ops, hidden: Hidden) -> Logits:
        """[S, H] in front of the last norm -> [S, V]."""
        ...


MODELS: dict[str, type[Model]] = {"Qwen3ForCausalLM": Qwen3}


def model_class(config: ModelConfig) -> type[Model]:
    """The class of the config's architecture. Raises ModelLoadError where there is none."""
    require_supported(config.architecture)
    return MODELS[config.architecture]
