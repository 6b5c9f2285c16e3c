"""Expands a step's arena (cython/arena.pxd) into a Batch, in torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zllm.native import arena as layout
from zllm.runtime.config import BLOCK_SIZE
from zllm.runtime.kv_cache import KVCache
from zllm.runtime.ops import Batch
from zllm.runtime.row_tables import RowTables
from zllm.runtime.torch_attention import plan_attention

Arena = npt.NDArray[np.int32]

_WORTHWHILE = 128
"""Tokens more than samples from which on a step of the samples alone is worth being planned: with
the embedded model 512 tokens take 7% less so, 1,500 take 11% less."""


def pairs(arena: Arena, count: int, offset: int) -> Tensor:
    """A section of block pairs [count, 2]; `count` and `offset` are header fields."""
    start = arena[offset]
    return torch.from_numpy(arena[start : start + 2 * arena[count]].reshape(-1, 2))


def update_tables(arena: Arena, tables: RowTables) -> None:
    """Apply the step's changes of block tables and sampling parameters."""
    device = tables.last_token.device
    count, start = arena[layout.H_NUM_TABLE_UPDATES], arena[layout.H_TABLE_UPDATES]
    if count:
        updates = torch.from_numpy(arena[start : start + 3 * count].reshape(-1, 3)).to(device)
        row, index, block = updates.unbind(1)
        tables.block_table.index_put_((row.long(), index.long()), block)
    count, start = arena[layout.H_NUM_PARAM_UPDATES], arena[layout.H_PARAM_UPDATES]
    if count:
        words = arena[start : start + layout.PARAM_WORDS * count]
        params = torch.from_numpy(words.reshape(-1, layout.PARAM_WORDS)).to(device)
        tables.params.index_copy_(0, params[:, layout.P_ROW].long(), params)


def prepare(arena: Arena, tables: RowTables, cache: KVCache, dtype: torch.dtype) -> Batch:
    """Positions, slots and tokens of a step, and its attention's work. Tables are up to date.

    dtype: of the hidden states.
    """
    device = tables.last_token.device
    num_rows = int(arena[layout.H_NUM_ROWS])
    num_tokens = int(arena[layout.H_NUM_TOKENS])
    # One copy: the step reads its batch after the scheduler may have packed the next arena.
    words = arena[: arena[layout.H_NUM_WORDS]].copy()
    rows = _section(words, layout.H_ROWS, num_rows)
    q_start = _section(words, layout.H_Q_START, num_rows + 1)
    kv_len = _section(words, layout.H_KV_LEN, num_rows)
    flags = _section(words, layout.H_FLAGS, num_rows)
    tokens = _section(words, layout.H_TOKENS, num_tokens)

    lengths = np.diff(q_start)
    positions = np.arange(num_tokens, dtype=np.int32) + np.repeat(kv_len - q_start[:-1], lengths)
    sampled = np.flatnonzero(flags & layout.F_SAMPLE)
    on_device = np.flatnonzero(flags & layout.F_TOKEN_ON_DEVICE)

    device_tokens = torch.from_numpy(tokens).to(device)
    if len(on_device):
        last = tables.last_token[torch.from_numpy(rows[on_device]).to(device)]
        device_tokens[torch.from_numpy(q_start[on_device]).to(device)] = last
    device_positions = torch.from_numpy(positions).to(device)
    row_of_token = torch.from_numpy(np.repeat(rows, lengths)).to(device)
    blocks = tables.block_table[row_of_token, device_positions // BLOCK_SIZE]
    slots = blocks * BLOCK_SIZE + device_positions % BLOCK_SIZE
    batch = Batch(
        tokens=device_tokens,
        positions=device_positions,
        slots=slots,
        rows=torch.from_numpy(rows).to(device),
        q_start=torch.from_numpy(q_start).to(device),
        kv_len=torch.from_numpy(kv_len).to(device),
        sample_tokens=torch.from_numpy(q_start[sampled + 1] - 1).to(device),
        sample_rows=torch.from_numpy(rows[sampled]).to(device),
        block_table=tables.block_table,
        work=plan_attention(
            cache,
            slots,
            tables.block_table,
            rows,
            q_start,
            kv_len,
            int(arena[layout.H_NUM_DECODES]),
            dtype,
        ),
    )
    if not len(sampled) or num_tokens < len(sampled) + _WORTHWHILE:
        return batch
    return replace(batch, samples=_samples(batch, cache, dtype))


def _samples(batch: Batch, cache: KVCache, dtype: torch.dtype) -> Batch:
    """The sampled tokens as a step of decodes."""
    count = len(batch.sample_rows)
    q_start = np.arange(count + 1, dtype=np.int32)
    one_each = torch.from_numpy(q_start).to(batch.rows.device)
    positions = batch.positions.index_select(0, batch.sample_tokens)
    slots = batch.slots.index_select(0, batch.sample_tokens)
    rows, kv_len = batch.sample_rows.cpu().numpy(), positions.cpu().numpy()
    table = batch.block_table
    return Batch(
        tokens=batch.tokens.index_select(0, batch.sample_tokens),
        positions=positions,
        slots=slots,
        rows=batch.sample_rows,
        q_start=one_each,
        kv_len=positions,
        sample_tokens=one_each[:-1],
        sample_rows=batch.sample_rows,
        block_table=table,
        work=plan_attention(cache, slots, table, rows, q_start, kv_len, count, dtype),
        all_sample=True,
    )


def _section(words: Arena, offset: int, count: int) -> Arena:
    start = words[offset]
    return words[start : start + count]
