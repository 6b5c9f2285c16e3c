"""Paged attention in torch: the reference of the CUDA kernels, and the CPU's own.

Decodes run together: the blocks of all of them are gathered into one padded tensor, so a step
costs a handful of calls a layer however many sequences decode. Chunks of prompts run one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from zllm.runtime.config import BLOCK_SIZE
from zllm.runtime.kv_cache import KVCache

_CHUNK_QUERIES = 512
"""Queries of a chunk that attend at once, so that their mask stays small."""
_SHORT = 8
"""Sequences of at most so many blocks are padded to each other without a second thought."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decodes of similar length, one query each."""

    tokens: Tensor | None
    """[n] their indices among the step's tokens; None: the first n."""
    size: int
    runs: Tensor
    """[2 * n * Hkv * blocks] the runs of 16 * D to gather: keys, then values."""
    mask: Tensor
    """[n, 1, 1, blocks * 16] 0 where a key exists, -inf where the row is padded."""


@dataclass(frozen=True, slots=True)
class ChunkQueries:
    """Consecutive queries of a chunk."""

    start: int
    stop: int
    kv_len: int
    """Keys that the last of them sees."""
    mask: Tensor | None
    """[queries, kv_len] 0 or -inf; None: plainly causal, no key before the chunk."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The new tokens of one prompt."""

    runs: Tensor
    """[2 * Hkv * blocks] the runs to gather: keys, then values."""
    queries: list[ChunkQueries]


@dataclass(slots=True)
class AttentionWork:
    """What attention makes of a batch, once for all layers."""

    decodes: list[DecodeGroup]
    chunks: list[Chunk]
    write_runs: Tensor
    """[P * 2 * Hkv] where each token's keys and values go, in units of D."""
    rotations: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By table: the cosines and sines at the step's positions."""


def plan_attention(
    cache: KVCache,
    slots: Tensor,
    block_table: Tensor,
    rows: npt.NDArray[np.int32],
    q_start: npt.NDArray[np.int32],
    kv_len: npt.NDArray[np.int32],
    num_decodes: int,
    dtype: torch.dtype,
) -> AttentionWork:
    """Turn a step's rows into gather indices and masks.

    slots: [P] int32; rows [R], q_start [R + 1], kv_len [R] are the arena's, on the host.
    dtype: of the queries, hence of the masks.
    """
    planner = _Planner(cache, block_table, dtype)
    lengths = kv_len + q_start[1:] - q_start[:-1]
    decodes = [
        planner.decodes(members, rows, lengths)
        for members in _groups(-(-lengths[:num_decodes] // BLOCK_SIZE))
    ]
    chunks = [
        planner.chunk(int(rows[r]), int(q_start[r]), int(q_start[r + 1]), int(kv_len[r]))
        for r in range(num_decodes, len(rows))
    ]
    return AttentionWork(decodes, chunks, planner.write_runs(slots))


def attend(q: Tensor, work: AttentionWork, cache: KVCache, layer: int, scale: float) -> Tensor:
    """[P, Hq, D] -> [P, Hq * D]: each row over its own blocks."""
    num_tokens, num_heads, head_dim = q.shape
    if len(work.decodes) == 1 and not work.chunks:
        return _decode(q, work.decodes[0], cache, layer, scale)
    out = q.new_empty(num_tokens, num_heads * head_dim)
    for group in work.decodes:
        if group.tokens is None:
            out[: group.size] = _decode(q[: group.size], group, cache, layer, scale)
        else:
            out[group.tokens] = _decode(q[group.tokens], group, cache, layer, scale)
    for chunk in work.chunks:
        _prefill(q, out, chunk, cache, layer, scale)
    return out


def write_kv(kv: Tensor, work: AttentionWork, cache: KVCache, layer: int) -> None:
    """[P, 2 * Hkv, D] keys, then values of each token: store them at the tokens' slots."""
    head_dim = kv.shape[-1]
    first = cache.keys[layer].storage_offset() // head_dim
    cache.data.view(-1, head_dim)[first:].index_copy_(0, work.write_runs, kv.reshape(-1, head_dim))


def written_kv(work: AttentionWork, cache: KVCache, layer: int, num_tokens: int) -> Tensor:
    """[P, 2 * Hkv * D] what `write_kv` stored for the step's P tokens."""
    head_dim = cache.keys[layer].shape[-1]
    first = cache.keys[layer].storage_offset() // head_dim
    written = cache.data.view(-1, head_dim)[first:].index_select(0, work.write_runs)
    return written.view(num_tokens, -1)


def _groups(blocks: npt.NDArray[np.int32]) -> list[npt.NDArray[np.int64]]:
    """Split rows by their number of blocks, so that padding at most doubles a group's work."""
    order = np.argsort(-blocks, kind="stable")
    groups = []
    start = 0
    while start < len(order):
        longest = blocks[order[start]]
        fits = blocks[order] * 2 >= longest
        stop = len(order) if longest <= _SHORT else int(fits.sum())
        groups.append(np.sort(order[start:stop]))
        start = stop
    return groups


class _Planner:
    """The cache's geometry in units of one head's run in a block (16 * D elements)."""

    def __init__(self, cache: KVCache, block_table: Tensor, dtype: torch.dtype) -> None:
        keys, values = cache.keys[0], cache.values[0]
        _, self.num_kv_heads, _, head_dim = keys.shape
        run = BLOCK_SIZE * head_dim
        self.block_stride = keys.stride(0) // run
        self.value_offset = (values.storage_offset() - keys.storage_offset()) // run
        self.block_table = block_table
        self.dtype = dtype
        self.device = block_table.device
        self.heads = torch.arange(self.num_kv_heads, device=self.device)

    def write_runs(self, slots: Tensor) -> Tensor:
        slots = slots.long()
        block_start = slots // BLOCK_SIZE * (self.block_stride * BLOCK_SIZE) + slots % BLOCK_SIZE
        keys = block_start[:, None] + self.heads * BLOCK_SIZE
        return torch.cat([keys, keys + self.value_offset * BLOCK_SIZE], dim=1).flatten()

    def read_runs(self, blocks: Tensor) -> Tensor:
        """[n, blocks] -> [2 * n * Hkv * blocks]: keys, then values, each head by head."""
        keys = blocks.long()[:, None, :] * self.block_stride + self.heads[:, None]
        return torch.stack([keys, keys + self.value_offset]).flatten()

    def decodes(
        self,
        members: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int32],
        lengths: npt.NDArray[np.int32],
    ) -> DecodeGroup:
        kv_len = lengths[members]
        num_blocks = int(-(-kv_len.max() // BLOCK_SIZE))
        table = self.block_table[torch.from_numpy(rows[members]).to(self.device), :num_blocks]
        exists = np.arange(num_blocks * BLOCK_SIZE, dtype=np.int32) < kv_len[:, None]
        # What pads a row is masked, but must be finite: block 0, and not the table's stale entry,
        # which may be the block of a row that is about to fail.
        table = table * torch.from_numpy(exists[:, ::BLOCK_SIZE]).to(self.device)
        mask = torch.from_numpy(np.where(exists, np.float32(0.0), np.float32(-np.inf)))
        whole = len(members) == members[-1] + 1
        return DecodeGroup(
            None if whole else torch.from_numpy(members).to(self.device),
            len(members),
            self.read_runs(table),
            mask.to(self.device, self.dtype)[:, None, None, :],
        )

    def chunk(self, row: int, start: int, stop: int, kv_len: int) -> Chunk:
        length = kv_len + stop - start
        num_blocks = -(-length // BLOCK_SIZE)
        runs = self.read_runs(self.block_table[row : row + 1, :num_blocks])
        if kv_len == 0:
            return Chunk(runs, [ChunkQueries(start, stop, length, None)])
        pieces = []
        for first in range(start, stop, _CHUNK_QUERIES):
            last = min(first + _CHUNK_QUERIES, stop)
            seen = kv_len + last - start
            positions = torch.arange(seen - (last - first), seen, device=self.device)
            visible = torch.arange(seen, device=self.device) <= positions[:, None]
            mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device)
            pieces.append(ChunkQueries(first, last, seen, mask.masked_fill_(~visible, -torch.inf)))
        return Chunk(runs, pieces)


def _gather(cache: KVCache, layer: int, runs: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Keys and values [rows, Hkv, blocks * 16, D] of the runs."""
    _, num_kv_heads, block_size, head_dim = cache.keys[layer].shape
    run = block_size * head_dim
    first = cache.keys[layer].storage_offset() // run
    gathered = cache.data.view(-1, run)[first:].index_select(0, runs)
    keys, values = gathered.view(2, rows, num_kv_heads, -1, head_dim).unbind(0)
    return keys, values


def _decode(q: Tensor, group: DecodeGroup, cache: KVCache, layer: int, scale: float) -> Tensor:
    """[n, Hq, D] -> [n, Hq * D]. The queries of one KV head stand as one sequence of queries."""
    num_tokens, num_heads, head_dim = q.shape
    keys, values = _gather(cache, layer, group.runs, num_tokens)
    grouped = q.view(num_tokens, keys.shape[1], -1, head_dim)
    out = functional.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=group.mask, scale=scale
    )
    return out.reshape(num_tokens, num_heads * head_dim)


def _prefill(
    q: Tensor, out: Tensor, chunk: Chunk, cache: KVCache, layer: int, scale: float
) -> None:
    """Attend one chunk's queries and write them to their rows of `out`."""
    _, num_heads, head_dim = q.shape
    keys, values = _gather(cache, layer, chunk.runs, 1)
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    for piece in chunk.queries:
        length = piece.stop - piece.start
        # [G, Hkv, n, D]: the heads that share keys differ in the first dimension, over which
        # the keys are broadcast without a copy.
        queries = q[piece.start : piece.stop].view(length, num_kv_heads, group, head_dim)
        attended = functional.scaled_dot_product_attention(
            queries.permute(2, 1, 0, 3),
            keys[:, :, : piece.kv_len].expand(group, -1, -1, -1),
            values[:, :, : piece.kv_len].expand(group, -1, -1, -1),
            attn_mask=piece.mask,
            is_causal=piece.mask is None,
            scale=scale,
        )
        out[piece.start : piece.stop] = attended.permute(2, 1, 0, 3).reshape(length, -1)
