"""How a GPU's memory is shared out: weights, a step's working memory, KV blocks with the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zllm.errors import ConfigError

_GIB = 1024**3
_GRAPH_RESERVE = 512 * 1024**2
"""For CUDA graphs and what the driver takes for kernels that load late."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose, and the blocks that fit."""

    total: int
    usable: int
    """total * gpu_memory_utilization."""
    other: int
    """The CUDA context, the libraries, and other processes on this GPU."""
    weights: int
    step: int
    """The largest step's working memory, as profiled, twice: graphs hold one more."""
    block_bytes: int
    num_blocks: int

    def lines(self) -> list[str]:
        """The plan as a table."""
        cache = self.num_blocks * self.block_bytes
        rest = self.total - self.other - self.weights - self.step - cache
        named = {
            "weights": self.weights,
            "KV cache": cache,
            "step": self.step,
            "context, others": self.other,
            "left free": rest,
        }
        return [f"  {name:16s}{size / _GIB:8.2f} GiB" for name, size in named.items()]


def plan_memory(
    device: torch.device,
    *,
    weights: int,
    step_peak: int,
    block_bytes: int,
    utilization: float,
    wanted_blocks: int | None,
    request_blocks: int,
    shrink: bool,
) -> MemoryPlan:
    """Share out the device's memory.

    wanted_blocks: the pool's size where it is fixed; request_blocks: what one request of full
    length needs. `shrink` allows a pool that holds less. Raises ConfigError where it does not fit.
    """
    free, total = torch.cuda.mem_get_info(device)
    other = total - free - torch.cuda.memory_reserved(device)
    usable = int(total * utilization)
    step = 2 * step_peak + _GRAPH_RESERVE
    left = usable - other - weights - step
    # Block 0 belongs to nobody.
    fitting = max(left, 0) // block_bytes - 1
    needed = wanted_blocks or (1 if shrink else request_blocks)
    num_blocks = wanted_blocks or fitting
    if fitting < needed:
        raise ConfigError(
            f"the GPU has {total / _GIB:.1f} GiB, of which gpu_memory_utilization={utilization} "
            f"allows {usable / _GIB:.1f}; weights take {weights / _GIB:.1f}, a step "
            f"{step / _GIB:.1f}, other users {other / _GIB:.1f}: {max(fitting, 0)} KV blocks are "
            f"left and {needed} are needed. Lower max_model_len, num_kv_blocks or "
            f"max_num_batched_tokens, raise gpu_memory_utilization, or take a smaller model"
        )
    return MemoryPlan(total, usable, other, weights, step, block_bytes, num_blocks)
