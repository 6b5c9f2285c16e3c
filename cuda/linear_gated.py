"""SwiGLU's products for many rows on Hopper: silu(x gate^T) * (x up^T) in one kernel
(kernels/linear_gated.cu). Few rows are `zllm.cuda.linear`'s; other GPUs have cuBLAS and a kernel
behind it (decision 067)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zllm.cuda.checks import SCALARS, require, require_vectors
from zllm.cuda.compiler import Program
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.tensor_map import TensorMaps
from zllm.errors import KernelError

_DTYPES = (torch.bfloat16, torch.float16)
_MIN_ROWS = 384
_MIN_USEFUL = 0.82
"""Of the clusters' time: below, cuBLAS's smaller tiles and a kernel behind it are faster."""
_THREADS = 384
_ROWS, _COLUMNS, _DEPTH = 128, 96, 64
_PIECE = 32
_STAGES, _STAGE_BYTES = 5, (_ROWS + 2 * _COLUMNS) * 2 * _DEPTH + 16


class GatedLinear:
    """Products of one device."""

    def __init__(self, library: KernelLibrary) -> None:
        properties: Any = torch.cuda.get_device_properties(library.device)
        self.available = (properties.major, properties.minor) == (9, 0)
        self._library = library
        self._clusters = library.num_sms // 2
        self._maps = TensorMaps()

    def supports(self, m: int, n: int, k: int, dtype: torch.dtype) -> bool:
        """Whether [m, k] x [n, k]^T is computed here, and faster than by cuBLAS and another
        kernel."""
        return (
            self.available
            and dtype in _DTYPES
            and n % (2 * _PIECE) == 0
            and k % 8 == 0
            and m >= _MIN_ROWS
            and useful_share(m, n // 2, self._clusters) >= _MIN_USEFUL
        )

    def linear(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """[P, K], [2 * I, K] -> [P, I] in x's dtype: silu(x gate^T) * (x up^T), float32 inside,
        where the first half of weight is the gate and the second the up projection (Shazeer 2020).
        Any P works, `supports` or not; I is a multiple of 32, K of 8."""
        device = self._library.device
        require("x", x, _DTYPES, (None, None), device)
        m, k = x.shape
        require("weight", weight, (x.dtype,), (None, k), device)
        n = weight.shape[0]
        if n % (2 * _PIECE):
            raise KernelError(f"weight has {n} rows: they must be a multiple of {2 * _PIECE}")
        inter = n // 2
        if out is None:
            out = x.new_empty(m, inter)
        require("out", out, (x.dtype,), (m, inter), device)
        for name, tensor in (("x", x), ("weight", weight), ("out", out)):
            require_vectors(name, tensor)
        # The copy engine brings W in the order that the kernel has its rows in.
        x_map = self._maps.get(x, (k, m), (k,), (_DEPTH, _ROWS))
        w_map = self._maps.get(
            weight,
            (k, 2, 4, 4, n // _PIECE),
            (k, 8 * k, 2 * k, _PIECE * k),
            (_DEPTH, 2, 4, 4, _COLUMNS // _PIECE),
        )
        tiles = _tiles(m, inter)
        which = program(x.dtype)
        self._library.get(which.source, "linear_gated", which.defines).launch(
            (2 * min(tiles, self._clusters), 1, 1),
            (_THREADS, 1, 1),
            (x_map, w_map, out, m, inter, k),
            shared_bytes=_STAGES * _STAGE_BYTES,
            pdl=True,
        )
        return out


def program(dtype: torch.dtype) -> Program:
    return Program("linear_gated.cu", {"SCALAR": SCALARS[dtype]})


def useful_share(m: int, inter: int, clusters: int) -> float:
    """The part of the clusters' time that is not spent on rows and columns outside [m, inter], nor
    on waiting for the last round of tiles to end."""
    rounds = -(-_tiles(m, inter) // clusters)
    return m * inter / (rounds * clusters * 2 * _ROWS * _COLUMNS)


def _tiles(m: int, inter: int) -> int:
    """Pairs of tiles: what a cluster works on at a time."""
    return -(-m // (2 * _ROWS)) * -(-inter // _COLUMNS)
