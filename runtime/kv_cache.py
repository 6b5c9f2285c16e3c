"""The paged KV cache: one allocation, and the one place that states its layout.

Blocks of 16 tokens, head-major inside a block, so that the keys of one head in a block are one
contiguous run of 16 * D elements. The views' strides say where a layer's block starts, so
block-major and layer-major differ in this file alone:

    block-major   [block, layer, K|V, kv head, 16, D]
    layer-major   [layer, K|V, block, kv head, 16, D]

The CUDA kernels store the 16 x D run of one head in a permuted order that suits shared memory
(cuda/include/kv_layout.cuh); since every kernel of that backend reads and writes it so, and block
copies move whole runs, nobody else needs to know. TorchOps stores it plainly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from zllm.runtime.config import BLOCK_SIZE, KVCacheDType
from zllm.runtime.model_config import ModelConfig

Layout = Literal["block_major", "layer_major"]

_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every layer."""

    data: Tensor
    """The allocation."""
    keys: list[Tensor]
    """By layer: a view [num_blocks, Hkv, 16, D]."""
    values: list[Tensor]
    """By layer: a view [num_blocks, Hkv, 16, D]."""
    layout: Layout = "block_major"

    @property
    def num_blocks(self) -> int:
        return self.keys[0].shape[0]

    def by_block(self) -> Tensor:
        """The allocation with the block as its first dimension: what copies and swaps move."""
        return self.data if self.layout == "block_major" else self.data.permute(2, 0, 1, 3, 4, 5)

    def runs(self) -> Tensor:
        """[num_blocks, runs, width]: a block as its contiguous runs, for kernels that copy it."""
        blocks = self.num_blocks
        if self.layout == "block_major":
            return self.data.view(blocks, 1, -1)
        layers = self.data.shape[0]
        return self.data.view(2 * layers, blocks, -1).transpose(0, 1)


def kv_cache_dtype(name: KVCacheDType, dtype: torch.dtype) -> torch.dtype:
    """The cache's type by its name in the configuration; auto is the activations' dtype."""
    return dtype if name == "auto" else _DTYPES[name]


def block_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return BLOCK_SIZE * per_token * dtype.itemsize


def allocate_kv_cache(
    config: ModelConfig,
    num_blocks: int,
    dtype: torch.dtype,
    device: torch.device,
    layout: Layout = "block_major",
    *,
    pinned: bool = False,
) -> KVCache:
    """A cache of `num_blocks`, all zero: what is masked is multiplied by 0, and must be finite."""
    run = (config.num_kv_heads, BLOCK_SIZE, config.head_dim)
    if layout == "block_major":
        data = _zeros((num_blocks, config.num_layers, 2, *run), dtype, device, pinned)
        keys = [data[:, layer, 0] for layer in range(config.num_layers)]
        values = [data[:, layer, 1] for layer in range(config.num_layers)]
    else:
        data = _zeros((config.num_layers, 2, num_blocks, *run), dtype, device, pinned)
        keys = [data[layer, 0] for layer in range(config.num_layers)]
        values = [data[layer, 1] for layer in range(config.num_layers)]
    return KVCache(data, keys, values, layout)


def copy_blocks(source: KVCache, target: KVCache, pairs: Tensor) -> None:
    """[C, 2] of (source block, target block): copy each over all layers. For copy-on-write both
    caches are the same, and no block is both a source and a target."""
    if pairs.shape[0]:
        sources = pairs[:, 0].to(source.data.device, torch.int64)
        targets = pairs[:, 1].to(target.data.device, torch.int64)
        moved = source.by_block()[sources].to(target.data.device)
        target.by_block().index_copy_(0, targets, moved)


def pool_line(num_blocks: int, block_bytes: int, max_model_len: int) -> str:
    """How many requests of full length a pool of so many blocks holds."""
    full = num_blocks / -(-max_model_len // BLOCK_SIZE)
    return (
        f"KV cache: {num_blocks:,} blocks of {BLOCK_SIZE} tokens, "
        f"{num_blocks * block_bytes / 1024**3:,.2f} GiB: {full:,.1f} requests of full length "
        f"({max_model_len:,} tokens)"
    )


def _zeros(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, pinned: bool
) -> Tensor:
    size = int(np.prod(shape)) * dtype.itemsize
    if device.type != "cpu" or pinned or not size:
        return torch.zeros(shape, dtype=dtype, device=device, pin_memory=pinned and size > 0)
    # numpy asks the system for zero pages, which take memory only once they are written:
    # a pool that is sized for the worst case costs what is used.
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)
