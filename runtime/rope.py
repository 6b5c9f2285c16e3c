"""The table of rotary position embeddings (Su et al. 2021, RoFormer)."""

from __future__ import annotations

import torch
from torch import Tensor

from zllm.runtime.model_config import RopeConfig


def rope_table(rope: RopeConfig, head_dim: int, max_len: int, device: torch.device) -> Tensor:
    """float32 [max_len, D]: D/2 cosines, then D/2 sines, of position * theta^(-2i/D).

    In float32 throughout, as the models were trained.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    positions = torch.arange(max_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1)
