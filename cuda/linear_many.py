"""Products with many rows on Hopper, each with what follows it: SwiGLU (kernels/linear_gated.cu),
or QK-norm, RoPE and the cache write (kernels/linear_qkv.cu), and with the RMSNorm before it, where
its gains stand in the weight. Few rows are `zllm.cuda.linear`'s; other GPUs and shapes have cuBLAS
and a kernel before and behind it (decisions 067, 075 and 080)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zllm.cuda.checks import SCALARS, require, require_vectors
from zllm.cuda.compiler import Program
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.rope_cache import RopeCache, head_macros
from zllm.cuda.tensor_map import TensorMaps
from zllm.errors import KernelError

_DTYPES = (torch.bfloat16, torch.float16)
_MIN_USEFUL = 0.82
"""Of the clusters' time: below, cuBLAS's smaller tiles and a kernel behind it are faster."""
_THREADS = 384
_ROWS, _DEPTH = 128, 64
HEAD_DIM = 128
"""Of the heads that `qkv` takes."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Columns of a tile, and the macros of include/many_rows.cuh for it."""

    columns: int
    stages: int
    cycles: int
    """For 16 of all k: what goes through shared memory, or how long the tensor cores take."""

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the ring, the rounded sums, all barriers, two tiles' scales."""
        stage = (_ROWS + self.columns) * _DEPTH * 2 + 16
        return self.stages * stage + _ROWS * (self.columns + 8) * 2 + 16 + 2 * _ROWS * 4

    def count(self, m: int, n: int) -> int:
        """Pairs of tiles in [m, n]: what a cluster works on at a time."""
        return _ceil(m, 2 * _ROWS) * _ceil(n, self.columns)

    def useful_share(self, m: int, n: int, clusters: int) -> float:
        """The part of the clusters' time that is not spent on rows and columns outside [m, n], on
        waiting for the last round of tiles to end, or on shared memory."""
        rounds = _ceil(self.count(m, n), clusters)
        return m * n / (rounds * clusters * 2 * _ROWS * self.cycles)

    def macros(self, dtype: torch.dtype, norm: bool) -> dict[str, str | int]:
        tile = {"COLUMNS": self.columns, "STAGES": self.stages, "NORM": int(norm)}
        return {"SCALAR": SCALARS[dtype], **tile}


WIDE, NARROW = Tile(256, 3, 256), Tile(192, 4, 208)


@dataclass(frozen=True, slots=True)
class NormsAhead:
    """What products of the same rows need to apply, each, a norm without gains first."""

    scales: tuple[Tensor, ...]
    """float32 [P] zeros, each for one product."""

    @staticmethod
    def of(norms: int, rows: int, device: torch.device) -> NormsAhead:
        return NormsAhead(torch.zeros(norms, rows, dtype=torch.float32, device=device).unbind())

    def behind(self) -> NormsAhead:
        """Behind the next product."""
        return NormsAhead(self.scales[1:])


def applies_norms(library: KernelLibrary, dtype: torch.dtype) -> bool:
    """Whether products here apply norms without gains. Sums of x as it is must not overflow."""
    return library.hopper and dtype == torch.bfloat16


class ManyRows:
    """Products of one device."""

    MIN_ROWS = 384
    """Fewer rows are not taken."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library
        self._clusters = library.clusters_at_once(2) if library.hopper else library.num_sms // 2
        self._maps = TensorMaps()

    def supports_gated(self, m: int, n: int, k: int, dtype: torch.dtype) -> bool:
        """Whether `gated` of [m, k] and [n, k] is faster than cuBLAS and another kernel."""
        share = self._tile(m, n).useful_share(m, n, self._clusters)
        return self._takes(m, k, dtype) and n % 16 == 0 and share >= _MIN_USEFUL

    def supports_qkv(self, m: int, n: int, k: int, head_dim: int, dtype: torch.dtype) -> bool:
        """The same of `qkv`. Further rounds hide how a round's tiles end: it takes three."""
        several = WIDE.count(m, n) > 2 * self._clusters
        useful = WIDE.useful_share(m, n, self._clusters) >= _MIN_USEFUL
        return several and useful and self.takes_qkv(m, n, k, head_dim, dtype)

    def takes_qkv(self, m: int, n: int, k: int, head_dim: int, dtype: torch.dtype) -> bool:
        """Whether there is a kernel for `qkv` at all."""
        return self._takes(m, k, dtype) and head_dim == HEAD_DIM and n % HEAD_DIM == 0

    def _takes(self, m: int, k: int, dtype: torch.dtype) -> bool:
        return self._library.hopper and dtype in _DTYPES and k % 8 == 0 and m >= self.MIN_ROWS

    def _tile(self, m: int, n: int) -> Tile:
        return max(WIDE, NARROW, key=lambda tile: tile.useful_share(m, n, self._clusters))

    def gated(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor | None = None,
        *,
        norm: NormsAhead | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """[P, K], [2 * I, K] -> [P, I] in x's dtype: silu(x gate^T) * (x up^T), where the first
        half of weight is the gate and the second the up projection (Shazeer 2020). Sums are
        float32, and rounded before silu. Any P works; I and K are multiples of 8. With `norm`,
        which is used up, x is normalized first: x / sqrt(mean(x^2) + eps)."""
        m, n, k = self._check(x, weight, norm)
        if n % 16:
            raise KernelError(f"weight has {n} rows: they must be a multiple of 16")
        inter = n // 2
        if out is None:
            out = x.new_empty(m, inter)
        require("out", out, (x.dtype,), (m, inter), self._library.device)
        require_vectors("out", out)
        tile = self._tile(m, n)
        which = gated_program(x.dtype, tile, norm is not None)
        args = (eps, out, m, inter, k)
        self._launch(which, "linear_gated", tile, x, weight, norm, args)
        return out

    def qkv(
        self,
        x: Tensor,
        weight: Tensor,
        rope: RopeCache,
        out: Tensor | None = None,
        *,
        norm: NormsAhead | None = None,
    ) -> Tensor:
        """`rope_cache` of x weight^T, of which only q [P, Hq, D] is written beside the cache.

        [P, K], [(Hq + 2 Hkv) * D, K]; D is HEAD_DIM, K a multiple of 8. Sums are float32, and
        rounded before they are normalized. Any P works. `norm` is `gated`'s, with rope's eps."""
        m, n, k = self._check(x, weight, norm)
        rope.check(m, x.dtype, self._library.device)
        if rope.head_dim != HEAD_DIM:
            raise KernelError(f"keys has heads of {rope.head_dim}: they must be of {HEAD_DIM}")
        if n != rope.width:
            raise KernelError(f"weight has {n} rows: the heads need {rope.width}")
        if out is None:
            out = x.new_empty(m, rope.num_heads, HEAD_DIM)
        require("out", out, (x.dtype,), (m, rope.num_heads, HEAD_DIM), self._library.device)
        which = qkv_program(
            x.dtype,
            rope.keys.dtype,
            rope.num_heads,
            rope.num_kv_heads,
            rope.q_norm is not None,
            norm is not None,
        )
        args = (out, *rope.arguments(), m, k)
        self._launch(which, "linear_qkv", WIDE, x, weight, norm, args)
        return out

    def _check(self, x: Tensor, weight: Tensor, norm: NormsAhead | None) -> tuple[int, int, int]:
        device = self._library.device
        require("x", x, _DTYPES, (None, None), device)
        m, k = x.shape
        require("weight", weight, (x.dtype,), (None, k), device)
        for name, tensor in (("x", x), ("weight", weight)):
            require_vectors(name, tensor)
        if norm is not None:
            left = len(norm.scales)
            if left == 0 or not applies_norms(self._library, x.dtype):
                raise KernelError(f"norm: {left} left of {x.dtype}, needs one and torch.bfloat16")
            require("norm.scales[0]", norm.scales[0], (torch.float32,), (m,), device)
        return m, weight.shape[0], k

    def _launch(
        self,
        which: Program,
        function: str,
        tile: Tile,
        x: Tensor,
        weight: Tensor,
        norm: NormsAhead | None,
        args: tuple[Any, ...],
    ) -> None:
        (m, k), n = x.shape, weight.shape[0]
        x_map = self._maps.get(x, (k, m), (k,), (_DEPTH, _ROWS))
        w_map = self._maps.get(weight, (k, n), (k,), (_DEPTH, tile.columns // 2))
        self._library.get(which.source, function, which.defines).launch(
            (2 * min(tile.count(m, n), self._clusters), 1, 1),
            (_THREADS, 1, 1),
            (x_map, w_map, x, None if norm is None else norm.scales[0], *args),
            shared_bytes=tile.shared_bytes,
            pdl=True,
        )


def gated_program(dtype: torch.dtype, tile: Tile, norm: bool) -> Program:
    return Program("linear_gated.cu", tile.macros(dtype, norm))


def qkv_program(
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    qk_norm: bool,
    norm: bool,
) -> Program:
    heads = head_macros(cache_dtype, num_heads, num_kv_heads, qk_norm)
    return Program("linear_qkv.cu", WIDE.macros(dtype, norm) | heads)


def programs(
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    qk_norm: bool,
    norm: bool,
) -> Iterator[Program]:
    """What a model's products need, where they apply norms or have none to apply."""
    for tile in (WIDE, NARROW):
        yield gated_program(dtype, tile, norm)
    if head_dim == HEAD_DIM:
        for queries in (num_heads, 0):
            yield qkv_program(dtype, cache_dtype, queries, num_kv_heads, qk_norm, norm)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
