"""What an engine is told: frozen, checked once, printed by GetServerInfo.

The model's own shape is `ModelConfig` (runtime/model_config.py), read from its config.json.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from zllm.errors import ConfigError

BLOCK_SIZE = 16
"""Tokens in a block of the KV cache."""

Policy = Literal["fcfs", "priority", "sjf", "lpm", "fair"]
DType = Literal["auto", "float32", "float16", "bfloat16"]
KVCacheDType = Literal["auto", "fp32", "fp16", "bf16", "fp8_e4m3"]
Device = Literal["auto", "cpu", "cuda"]
LoadFormat = Literal["auto", "dummy"]
_CHOICES: dict[str, Any] = {
    "device": Device,
    "dtype": DType,
    "kv_cache_dtype": KVCacheDType,
    "scheduling_policy": Policy,
    "load_format": LoadFormat,
}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One model's engine. None means: choose from the model and the machine."""

    model: Path
    served_model_name: str = ""
    device: Device = "auto"
    dtype: DType = "auto"
    kv_cache_dtype: KVCacheDType = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    """Tokens of one step at most. None: 2,048 on the CPU, 8,192 on a GPU, and twice that there
    where nobody waits for single tokens."""
    interactive: bool = True
    """Somebody waits for single tokens, which a long step holds up. False: steps may be longer."""
    num_kv_blocks: int | None = None
    """Fixes the pool's size in blocks of 16 tokens; otherwise it follows from free memory."""
    gpu_memory_utilization: float = 0.9
    memory_share: float | None = None
    """Part of what one model alone would take, beside other models of the same server. None: an
    even part of what they leave; alone, all of it."""
    swap_space_gib: float = 0.0
    """Pinned host memory for swapped-out sequences; 0 preempts by recompute alone."""
    enable_prefix_caching: bool = True
    scheduling_policy: Policy = "fcfs"
    max_queued_requests: int = 4096
    max_queued_tokens: int = 16 * 1024 * 1024
    enforce_eager: bool = False
    """Never capture CUDA graphs."""
    seed: int = 0
    load_format: LoadFormat = "auto"
    """`dummy` draws random weights: for speed measurements."""

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            value = getattr(self, name)
            if value not in get_args(kind):
                choices = ", ".join(map(repr, get_args(kind)))
                raise ConfigError(f"{name} is {value!r}: it must be one of {choices}")
        for name in ("interactive", "enable_prefix_caching", "enforce_eager"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigError(f"{name} is {value!r}: it must be True or False")
        for name in ("max_num_seqs", "max_queued_requests", "max_queued_tokens"):
            value = getattr(self, name)
            if not _is_count(value):
                raise ConfigError(f"{name} is {value!r}: it must be an integer of at least 1")
        length = self.max_model_len
        if length is not None and not (_is_count(length) and length >= 2):
            raise ConfigError(
                f"max_model_len is {length!r}: it must be an integer of at least 2, for a prompt "
                "and an output take a token each, or left out"
            )
        for name in ("max_num_batched_tokens", "num_kv_blocks"):
            value = getattr(self, name)
            if value is not None and not _is_count(value):
                raise ConfigError(
                    f"{name} is {value!r}: it must be an integer of at least 1, or left out"
                )
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}: it must be in (0, 1]"
            )
        if self.memory_share is not None and not 0.0 < self.memory_share <= 1.0:
            raise ConfigError(f"memory_share is {self.memory_share}: it must be in (0, 1]")
        if not 0.0 <= self.swap_space_gib < math.inf:
            raise ConfigError(f"swap_space_gib is {self.swap_space_gib}: it must be 0 or more")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
