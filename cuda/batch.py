"""Takes a step's arena over and expands it on the device (kernels/batch.cu)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from zllm.cuda.checks import INT, require, require_pinned, require_vectors
from zllm.cuda.compiler import Program
from zllm.cuda.launcher import KernelLibrary

_THREADS = 1024


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
class Arenas:
    """The arenas of steps (cython/arena.pxd), int32 [words] each, a multiple of 4: two in pinned
    memory, which the host fills in turn, and the device's own, which has the last step's."""

    pinned: tuple[Tensor, Tensor]
    own: Tensor

    @staticmethod
    def allocate(num_words: int, device: int) -> Arenas:
        """For `num_words` words at least. The device's own is all zeros, a step of no rows; those
        in pinned memory are all -1, of no step."""
        words = -(-num_words // 4) * 4

        def pinned() -> Tensor:
            return torch.full((words,), -1, dtype=torch.int32, pin_memory=True)

        own = torch.zeros(words, dtype=torch.int32, device=f"cuda:{device}")
        return Arenas((pinned(), pinned()), own)


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
    sample_positions: Tensor
    sample_slots: Tensor


def program(arena_macros: Mapping[str, int]) -> Program:
    """`arena_macros`: the arena's H_, P_, F_ and PARAM_WORDS numbers."""
    return Program("batch.cu", arena_macros)


def allocate(num_tokens: int, num_rows: int, num_samples: int, device: int) -> BatchTensors:
    """Tensors for P tokens, R rows and S samples; sizes may be cut by slicing."""
    sizes = [num_tokens] * 3 + [num_rows, num_rows + 1, num_rows] + [num_samples] * 4
    empty = (torch.zeros(n, dtype=torch.int32, device=f"cuda:{device}") for n in sizes)
    return BatchTensors(*empty)


class BatchExpander:
    """Applies a step's arena on one device."""

    def __init__(self, kernels: KernelLibrary, arena_macros: Mapping[str, int]) -> None:
        which = program(arena_macros)
        self._take = kernels.get(which.source, "take_batch", which.defines)
        self._device = kernels.device
        self._pdl = kernels.pdl
        self._param_words = arena_macros["PARAM_WORDS"]
        self._header_words = arena_macros["HEADER_WORDS"]

    def __call__(
        self, arenas: Arenas, tables: BatchTables, batch: BatchTensors, *, places: bool = False
    ) -> None:
        """Take over the arena of the step after the one that `arenas.own` has, apply its updates to
        `tables`, then fill `batch` and pad it: tokens 0 at position 0 of slot 0, empty rows of the
        padding row, samples of token 0 and the padding row. Where no pinned arena is of that step,
        the one that `own` has is done again.

        `places`: also sample_positions and sample_slots, which are left as they are without it.

        Real sizes are read on the device, so a captured launch serves every step that fits `batch`;
        the caller sees to it that it does.
        """
        self._check(arenas, tables, batch)
        num_rows, max_blocks = tables.block_table.shape
        p, r, s = len(batch.tokens), len(batch.rows), len(batch.sample_rows)
        # What a step of one token a row comes to, each in a new block.
        expected = self._header_words + 4 * r + 1 + p + 3 * r
        ahead = min(-(-expected // 4), _THREADS, len(arenas.own) // 4)
        self._take.launch(
            (1, 1, 1),
            (_THREADS, 1, 1),
            (
                batch.tokens,
                batch.positions,
                batch.slots,
                batch.rows,
                batch.q_start,
                batch.kv_len,
                batch.sample_tokens,
                batch.sample_rows,
                batch.sample_positions if places else None,
                batch.sample_slots if places else None,
                arenas.own,
                tables.block_table,
                tables.params,
                tables.last_token,
                *arenas.pinned,
                ahead,
                max_blocks,
                p,
                r,
                s,
                num_rows - 1,
            ),
            pdl=self._pdl,
        )

    def _check(self, arenas: Arenas, tables: BatchTables, batch: BatchTensors) -> None:
        device = self._device
        require("arenas.own", arenas.own, INT, (None,), device)
        require_vectors("arenas.own", arenas.own)
        for i, pinned in enumerate(arenas.pinned):
            require_pinned(f"arenas.pinned[{i}]", pinned, arenas.own.shape)
        require("block_table", tables.block_table, INT, (None, None), device)
        num_rows = tables.block_table.shape[0]
        require("params", tables.params, INT, (num_rows, self._param_words), device)
        require("last_token", tables.last_token, INT, (num_rows,), device)
        p, r, s = len(batch.tokens), len(batch.rows), len(batch.sample_rows)
        sizes = (p, p, p, r, r + 1, r, s, s, s, s)
        for field, size in zip(fields(BatchTensors), sizes, strict=True):
            require(field.name, getattr(batch, field.name), INT, (size,), device)
