"""Split, QK-norm, RoPE and the write to the paged cache, in one pass (kernels/rope_cache.cu)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zllm.cuda.checks import FLOATS, INT, SCALARS, require, require_vectors
from zllm.cuda.compiler import Program
from zllm.cuda.launcher import Int64, KernelLibrary
from zllm.errors import KernelError

BLOCK_TOKENS = 16
_CACHES = (*FLOATS, torch.float8_e4m3fn)
_THREADS = 256
_FEW_TOKENS = 256


def program(
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    qk_norm: bool,
    tokens: int,
) -> Program:
    """The program for this many tokens; there are two. Few have a thread for every vector, so that
    a launch ends soonest; of many, each multiprocessor holds several."""
    threads = _THREADS
    if tokens <= _FEW_TOKENS:
        lanes = 1 << (head_dim * dtype.itemsize // 32 - 1).bit_length()
        threads = min(1024, -(-(num_heads + 2 * num_kv_heads) * lanes // 32) * 32)
    heads = head_macros(cache_dtype, num_heads, num_kv_heads, qk_norm)
    macros = {"SCALAR": SCALARS[dtype], "HEAD_DIM": head_dim, "THREADS": threads, **heads}
    return Program("rope_cache.cu", macros)


def head_macros(
    cache_dtype: torch.dtype, num_heads: int, num_kv_heads: int, qk_norm: bool
) -> dict[str, str | int]:
    """What every kernel is told that turns heads and writes them to the cache."""
    return {
        "CACHE": SCALARS[cache_dtype],
        "HEADS": num_heads,
        "KV_HEADS": num_kv_heads,
        "QK_NORM": int(qk_norm),
    }


@dataclass(frozen=True, slots=True)
class RopeCache:
    """How a step's heads are turned, and where keys and values go. The order inside a block of the
    cache is that of `permute_cache`."""

    positions: Tensor
    """int32 [P]."""
    slots: Tensor
    """int32 [P]."""
    keys: Tensor
    """[blocks, Hkv, 16, D], its blocks at any stride, of the model's dtype or a narrower one."""
    values: Tensor
    """As keys."""
    cos_sin: Tensor
    """float32 [max_len, D], D/2 cosines then D/2 sines."""
    num_heads: int
    """Hq."""
    q_norm: Tensor | None = None
    """[D]; both it and k_norm, or None."""
    k_norm: Tensor | None = None
    k_scale: Tensor | None = None
    """float32 [1] on the device: what is stored is divided by it; None is 1."""
    v_scale: Tensor | None = None
    eps: float = 1e-6

    @property
    def num_kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def head_dim(self) -> int:
        return self.keys.shape[3]

    @property
    def width(self) -> int:
        """Of all heads of a token."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def macros(self) -> dict[str, str | int]:
        qk_norm = self.q_norm is not None
        return head_macros(self.keys.dtype, self.num_heads, self.num_kv_heads, qk_norm)

    def check(self, tokens: int, dtype: torch.dtype, device: int) -> None:
        """That all fits P tokens of a model of `dtype`; raises KernelError."""
        keys, values = self.keys, self.values
        if keys.dim() != 4 or keys.shape[2] != BLOCK_TOKENS:
            raise KernelError(
                f"keys has shape {list(keys.shape)}: it must be [blocks, Hkv, {BLOCK_TOKENS}, D]"
            )
        require("positions", self.positions, INT, (tokens,), device)
        require("slots", self.slots, INT, (tokens,), device)
        require("cos_sin", self.cos_sin, (torch.float32,), (None, self.head_dim), device)
        if values.shape != keys.shape or values.stride() != keys.stride():
            raise KernelError(
                f"values has shape {list(values.shape)} and strides {list(values.stride())}: they "
                f"must be those of keys, {list(keys.shape)} and {list(keys.stride())}"
            )
        for name, cache in (("keys", keys), ("values", values)):
            require(f"{name}[0]", cache[0], _CACHES, tuple(keys.shape[1:]), device)
            if cache.dtype != keys.dtype or cache.element_size() > dtype.itemsize:
                raise KernelError(f"{name} is {cache.dtype}: it must not be wider than {dtype}")
        if self.head_dim * keys.element_size() % 32 or self.head_dim * dtype.itemsize % 32:
            raise KernelError(
                f"keys has heads of {self.head_dim} {keys.dtype}: they must fill 32 bytes"
            )
        if (self.q_norm is None) != (self.k_norm is None):
            raise KernelError("q_norm and k_norm: give both or neither")
        for name, weight in (("q_norm", self.q_norm), ("k_norm", self.k_norm)):
            if weight is not None:
                require(name, weight, (dtype,), (self.head_dim,), device)
                require_vectors(name, weight)
        for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if scale is not None:
                require(name, scale, (torch.float32,), (1,), device)

    def arguments(self) -> tuple[Any, ...]:
        """What a kernel takes of it."""
        return (
            self.keys,
            self.values,
            self.positions,
            self.slots,
            self.cos_sin,
            self.q_norm,
            self.k_norm,
            self.k_scale,
            self.v_scale,
            Int64(self.keys.stride(0)),
            self.eps,
        )


def rope_cache(
    kernels: KernelLibrary,
    qkv: Tensor,
    rope: RopeCache,
    *,
    early: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """[P, (Hq + 2 Hkv) * D] -> q [P, Hq, D]; keys and values get the rest.

    early: positions and slots were written before `PagedAttention.make_lists` was called, and are
    not waited for.
    """
    device, tokens = kernels.device, qkv.shape[0]
    rope.check(tokens, qkv.dtype, device)
    require("qkv", qkv, FLOATS, (None, rope.width), device)
    require_vectors("qkv", qkv)
    shape = (tokens, rope.num_heads, rope.head_dim)
    if out is None:
        out = qkv.new_empty(shape)
    else:
        require("out", out, (qkv.dtype,), shape, device)
    which = program(
        qkv.dtype,
        rope.keys.dtype,
        rope.num_heads,
        rope.num_kv_heads,
        rope.head_dim,
        rope.q_norm is not None,
        tokens,
    )
    kernels.get(which.source, "rope_cache", which.defines).launch(
        (tokens, 1, 1),
        (int(which.defines["THREADS"]), 1, 1),
        (out, qkv, *rope.arguments(), int(early)),
        pdl=kernels.pdl,
    )
    return out


def permute_cache(runs: Tensor) -> Tensor:
    """[..., 16, D] in token order -> the same shape in the order that the kernels store
    (include/kv_layout.cuh)."""
    out = torch.empty_like(runs, memory_format=torch.contiguous_format)
    index = _order(runs.shape[-1] * runs.element_size(), runs.device)
    chunks = _chunks(runs.contiguous())
    _chunks(out)[..., index, :] = chunks
    return out


def unpermute_cache(runs: Tensor) -> Tensor:
    """The inverse of `permute_cache`."""
    index = _order(runs.shape[-1] * runs.element_size(), runs.device)
    return _chunks(runs.contiguous())[..., index, :].view(runs.dtype).view(runs.shape)


def _chunks(runs: Tensor) -> Tensor:
    """[..., 16, D] -> [..., chunks, 16] bytes."""
    return runs.view(torch.uint8).view(*runs.shape[:-2], -1, 16)


def _order(row_bytes: int, device: torch.device) -> Tensor:
    """Where each 16-byte chunk of a run, in token order, is stored."""
    order = []
    for row in range(BLOCK_TOKENS):
        for chunk in range(row_bytes // 16):
            start, width = chunk // 8 * 8, 8  # a column, and its width in chunks
            if start + 8 > row_bytes // 16:
                width = 4 if start + 4 <= row_bytes // 16 and chunk - start < 4 else 2
                start = chunk // width * width
            swizzle = row // (8 // width) % width
            order.append(start * BLOCK_TOKENS + row * width + (chunk - start ^ swizzle))
    return torch.tensor(order, device=device)
