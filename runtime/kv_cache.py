"""The paged KV cache: one allocation, and the one place that states its layout.

Blocks of 16 tokens, head-major inside a block, so that the keys of one head in a block are one
contiguous run of 16 * D elements. `block_stride` and `layer_stride` say where a layer's block
starts, so block-major and layer-major differ in this file alone:

    block-major   [block, layer, K|V, kv head, 16, D]
    layer-major   [layer, K|V, block, kv head, 16, D]

The CUDA kernels store the 16 x D run of one head in a permuted order that suits shared memory
(cuda/include/kv_layout.cuh); since every kernel of that backend reads and writes it so, and block
copies move whole runs, nobody else needs to know. TorchOps stores it plainly.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every layer."""

    data: Tensor
    """The allocation."""
    keys: list[Tensor]
    """By layer: a view [num_blocks, Hkv, 16, D]."""
    values: list[Tensor]
    """By layer: a view [num_blocks, Hkv, 16, D]."""
