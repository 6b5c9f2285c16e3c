"""Expands a step's arena on the device (kernels/batch.cu)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from zllm.cuda.checks import INT, require
from zllm.cuda.compiler import Program
from zllm.cuda.launcher import KernelLibrary


@dataclass(frozen=True, slots=True)
class BatchTables:
    """What the device remembers by row, all int32. The last row is that of padding."""

    block_table: Tensor
    """[max_num_seqs + 1, max_blocks]."""
    params: Tensor
    """[max_num_seqs + 1, PARAM_WORDS]."""
    last_token: Tensor
    """[max_num_seqs + 1] the token last sampled for the row."""


@dataclass(frozen=True, slots=True)
class BatchTensors:
    """The step as kernels read it, all int32, at its padded sizes P, R and S."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    rows: Tensor
    q_start: Tensor
    kv_len: Tensor
    sample_tokens: Tensor
    sample_rows: Tensor


def program(arena_macros: Mapping[str, int]) -> Program:
    """`arena_macros`: the arena's H_, P_, F_ and PARAM_WORDS numbers."""
    return Program("batch.cu", arena_macros)


def allocate(num_tokens: int, num_rows: int, num_samples: int, device: int) -> BatchTensors:
    """Tensors for P tokens, R rows and S samples; sizes may be cut by slicing."""
    sizes = [num_tokens] * 3 + [num_rows, num_rows + 1, num_rows] + [num_samples] * 2
    empty = (torch.zeros(n, dtype=torch.int32, device=f"cuda:{device}") for n in sizes)
    return BatchTensors(*empty)


class BatchExpander:
    """Applies a step's arena on one device."""

    def __init__(self, kernels: KernelLibrary, arena_macros: Mapping[str, int]) -> None:
        which = program(arena_macros)
        self._apply = kernels.get(which.source, "apply_updates", which.defines)
        self._expand = kernels.get(which.source, "expand_batch", which.defines)
        self._device = kernels.device
        self._pdl = kernels.pdl
        self._param_words = arena_macros["PARAM_WORDS"]

    def __call__(self, arena: Tensor, tables: BatchTables, batch: BatchTensors) -> None:
        """Apply the arena's updates to `tables`, then fill `batch` and pad it: tokens 0 at
        position 0 of slot 0, empty rows of the padding row, samples of token 0 and the padding
        row.

        arena: int32 [words] on the device, the step's copy. Real sizes are read on the device, so
        a captured launch serves every step that fits `batch`; the caller sees to it that it does.
        """
        self._check(arena, tables, batch)
        num_rows, max_blocks = tables.block_table.shape
        p, r, s = len(batch.tokens), len(batch.rows), len(batch.sample_rows)
        self._apply.launch(
            (32, 1, 1),
            (256, 1, 1),
            (tables.block_table, tables.params, arena, max_blocks),
            pdl=self._pdl,
        )
        self._expand.launch(
            (-(-p // 256) + 2, 1, 1),
            (256, 1, 1),
            (
                batch.tokens,
                batch.positions,
                batch.slots,
                batch.rows,
                batch.q_start,
                batch.kv_len,
                batch.sample_tokens,
                batch.sample_rows,
                arena,
                tables.block_table,
                tables.last_token,
                max_blocks,
                p,
                r,
                s,
                num_rows - 1,
            ),
            pdl=self._pdl,
        )

    def _check(self, arena: Tensor, tables: BatchTables, batch: BatchTensors) -> None:
        device = self._device
        require("arena", arena, INT, (None,), device)
        require("block_table", tables.block_table, INT, (None, None), device)
        num_rows = tables.block_table.shape[0]
        require("params", tables.params, INT, (num_rows, self._param_words), device)
        require("last_token", tables.last_token, INT, (num_rows,), device)
        p, r, s = len(batch.tokens), len(batch.rows), len(batch.sample_rows)
        sizes = (p, p, p, r, r + 1, r, s, s)
        for field, size in zip(fields(BatchTensors), sizes, strict=True):
            require(field.name, getattr(batch, field.name), INT, (size,), device)
