"""The state of each running sequence that stays on the device, by its row.

A step's arena brings only what changed. Row `max_num_seqs` belongs to nobody: padding uses it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zllm.native import arena
from zllm.runtime.config import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class RowTables:
    """Tables on the device, all int32."""

    block_table: Tensor
    """[max_num_seqs + 1, max_blocks]."""
    last_token: Tensor
    """[max_num_seqs + 1] the token sampled last for the row."""
    params: Tensor
    """[max_num_seqs + 1, PARAM_WORDS] sampling parameters as the arena packs them."""


def allocate_row_tables(max_num_seqs: int, max_model_len: int, device: torch.device) -> RowTables:
    """All zero: block 0, token 0, greedy."""
    rows = max_num_seqs + 1
    max_blocks = -(-max_model_len // BLOCK_SIZE)
    return RowTables(
        torch.zeros(rows, max_blocks, dtype=torch.int32, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
        torch.zeros(rows, arena.PARAM_WORDS, dtype=torch.int32, device=device),
    )
