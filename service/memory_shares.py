"""How the models of one server share its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from zllm.errors import ConfigError
from zllm.runtime.config import EngineConfig

_LEAST = 1e-6


def share_out(configs: Sequence[EngineConfig]) -> list[EngineConfig]:
    """Gives each model without a memory_share an even part of what the others leave. One whose
    num_kv_blocks is fixed takes those and no share. Raises ConfigError where nothing is left."""
    named = sum(config.memory_share or 0.0 for config in configs)
    open_ones = [c for c in configs if c.memory_share is None and c.num_kv_blocks is None]
    left = 1.0 - named
    if left < -_LEAST or (open_ones and left < _LEAST):
        shares = ", ".join(
            f"{c.served_model_name}={c.memory_share:.3g}" for c in configs if c.memory_share
        )
        raise ConfigError(
            f"memory_share: the models' shares ({shares}) leave nothing: give each a smaller one, "
            "as in --model NAME=PATH,memory_share=0.4, or fix num_kv_blocks"
        )
    even = left / max(len(open_ones), 1)
    return [
        replace(c, memory_share=even) if c.memory_share is None and c.num_kv_blocks is None else c
        for c in configs
    ]
