"""How a GPU's memory is shared out: weights, a step's working memory, KV blocks with the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zllm.errors import ConfigError

_GIB = 1024**3
_GRAPH_RESERVE = 768 * 1024**2
"""For CUDA graphs, 9 MiB each with 28 layers, and what the driver takes for kernels that load
late."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose, and the blocks that fit."""

    total: int
    usable: int
    """This engine's share of total * gpu_memory_utilization, or what others have left of it."""
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


def memory_taken(device: torch.device) -> int:
    """Bytes that torch does not hold: the CUDA context, the libraries, other processes."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def plan_memory(
    device: torch.device,
    *,
    taken_before: int,
    share: float,
    weights: int,
    step_peak: int,
    block_bytes: int,
    utilization: float,
    wanted_blocks: int | None,
    request_blocks: int,
    shrink: bool,
) -> MemoryPlan:
    """Share out the device's memory.

    taken_before: memory_taken() when this engine began; share: of what all engines of this server
    may use, into which the others' memory does not count, though all must fit together.
    wanted_blocks: the pool's size where it is fixed; request_blocks: what one request of full
    length needs. `shrink` allows a pool that holds less. Raises ConfigError where it does not fit.
    """
    total = torch.cuda.mem_get_info(device)[1]
    other = memory_taken(device)
    allowed = int(total * utilization)
    usable = min(int(allowed * share), allowed - taken_before)
    step = 2 * step_peak + _GRAPH_RESERVE
    left = usable - (other - taken_before) - weights - step
    # Block 0 belongs to nobody.
    fitting = max(left, 0) // block_bytes - 1
    needed = wanted_blocks or (1 if shrink else request_blocks)
    num_blocks = wanted_blocks or fitting
    if fitting < needed:
        raise ConfigError(
            f"the GPU has {total / _GIB:.1f} GiB, of which gpu_memory_utilization={utilization} "
            f"and memory_share={share:g} allow {usable / _GIB:.1f}; weights take "
            f"{weights / _GIB:.1f}, a step {step / _GIB:.1f}, other users {other / _GIB:.1f}: "
            f"{max(fitting, 0)} KV blocks are left and {needed} are needed. Lower max_model_len, "
            f"num_kv_blocks or max_num_batched_tokens, raise gpu_memory_utilization or "
            f"memory_share, or take a smaller model"
        )
    return MemoryPlan(total, usable, other, weights, step, block_bytes, num_blocks)
