"""Matrix products with few rows: y = x W^T as a decode step needs it, at the speed of reading W.

`supports` says where this beats cuBLAS, by measurement (linear_plans.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zllm.cuda.compiler import Program
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.linear_plans import (
    SHARED_BYTES,
    TILE_ROWS,
    UNIT,
    Skinny,
    Tiled,
    faster_than_cublas,
    skinny_plan,
    tiled_plan,
)
from zllm.cuda.tensor_map import TensorMaps
from zllm.errors import KernelError

_SKINNY = "linear_skinny.cu", "linear_skinny"
_TILED = "linear_wgmma.cu", "linear_wgmma"
_SCALARS = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
_VECTOR = 8
"""Elements in the 16 bytes that one copy moves at least."""


class SkinnyLinear:
    """Products of one device. `programs` names what to compile ahead of the first call."""

    MAX_NORM_ROWS = 8
    """Rows of x that `linear` takes with `norm`: above them a kernel of its own is faster."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library
        properties: Any = torch.cuda.get_device_properties(library.device)
        self._hopper: bool = (properties.major, properties.minor) == (9, 0)
        self._limit = min(SHARED_BYTES, properties.shared_memory_per_block_optin)
        self.max_rows = TILE_ROWS[-1] if self._hopper else 16
        """Rows of x that `linear` takes."""
        self._maps = TensorMaps()

    def supports(self, m: int, n: int, k: int, dtype: torch.dtype, gated: bool = False) -> bool:
        """Whether [m, k] x [n, k]^T is computed here, and faster than by cuBLAS."""
        return (
            self._takes(m, n, gated)
            and dtype in _SCALARS
            and k % _VECTOR == 0
            and faster_than_cublas(m, n, k, self._library.num_sms, self._hopper)
        )

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        norm: Tensor | None = None,
        eps: float = 1e-6,
        gated: bool = False,
    ) -> Tensor:
        """[M, K], [N, K] -> [M, N] in x's dtype: x weight^T, summed in float32. Any shape with
        1 <= M <= max_rows and K a multiple of 8 works, `supports` or not.

        Fused, each optional: `norm` [K] applies RMSNorm (Zhang & Sennrich 2019) with `eps` to the
        rows of x first (bfloat16, as x * norm must not overflow, and up to MAX_NORM_ROWS); `gated`
        takes the first half of weight as gate and the second as up and gives silu(gate) * up,
        [M, N / 2] (Shazeer 2020); `residual` of out's shape is added last and may be `out` itself.
        """
        m, k = self._check_operands(x, weight, gated)
        n = weight.shape[0] // 2 if gated else weight.shape[0]
        if out is None:
            out = torch.empty(m, n, dtype=x.dtype, device=x.device)
        _check_like("out", out, x, (m, n))
        if residual is not None:
            _check_like("residual", residual, x, (m, n))
        if norm is not None:
            _check(m <= self.MAX_NORM_ROWS, f"norm: fused for {self.MAX_NORM_ROWS} rows, x has {m}")
            _check_like("norm", norm, x, (k,))
            _check(x.dtype == torch.bfloat16, f"norm: fused for bfloat16 only, x is {x.dtype}")

        plan = self._plan(m, weight.shape[0], k, gated)
        macros = _macros(plan, x.dtype, norm is not None, residual is not None, gated)
        if isinstance(plan, Skinny):
            kernel = self._library.get(*_SKINNY, macros)
            blocks = min(n, self._library.num_sms // plan.cluster) * plan.cluster
            grid = (blocks, 1, 1)
            shared_bytes = plan.shared_bytes(norm is not None)
            args: tuple[Any, ...] = (x, weight, out, residual, norm, float(eps), m, n, k)
        else:
            x_rows = plan.x_rows(m)
            kernel = self._library.get(*_TILED, macros)
            x_map = self._maps.get(x, (k, m), (k,), (plan.DEPTH, x_rows))
            if gated:
                sizes, box = (k, 8, 2, n // 8), (plan.DEPTH, 8, 2, plan.columns // (2 * UNIT))
                w_map = self._maps.get(weight, sizes, (k, n * k, 8 * k), box)
            else:
                w_map = self._maps.get(weight, (k, n), (k,), (plan.DEPTH, plan.columns))
            grid = plan.grid(m, weight.shape[0])
            shared_bytes = plan.shared_bytes
            args = (x_map, w_map, out, residual, m, n, k, x_rows)
        kernel.launch(
            grid,
            (plan.threads, 1, 1),
            args,
            shared_bytes=shared_bytes,
            pdl=self._library.pdl,
        )
        return out

    def programs(
        self,
        n: int,
        k: int,
        dtype: torch.dtype,
        *,
        norm: bool = False,
        residual: bool = False,
        gated: bool = False,
    ) -> Iterator[Program]:
        """The programs that products with an [n, k] weight need, whatever M; none for what is
        cuBLAS's. `norm`: fused as far as it can be."""
        sizes = (8, *TILE_ROWS)
        for fewest, m in zip((1, *(size + 1 for size in sizes)), sizes, strict=False):
            if self._takes(m, n, gated) and self.supports(fewest, n, k, dtype, gated):
                plan = self._plan(m, n, k, gated)
                source = (_TILED if isinstance(plan, Tiled) else _SKINNY)[0]
                with_norm = norm and m <= self.MAX_NORM_ROWS
                yield Program(source, _macros(plan, dtype, with_norm, residual, gated))

    def _takes(self, m: int, n: int, gated: bool) -> bool:
        return 1 <= m <= self.max_rows and (m <= 16 or not gated or n // 2 % UNIT == 0)

    def _plan(self, m: int, n: int, k: int, gated: bool) -> Skinny | Tiled:
        if self._hopper and m > 8 and not (gated and n // 2 % UNIT):
            library = self._library
            return tiled_plan(m, n, k, library.num_sms, library.clusters_at_once(4), gated)
        return skinny_plan(m, n, self._library.num_sms).fit(self._limit)

    def _check_operands(self, x: Tensor, weight: Tensor, gated: bool) -> tuple[int, int]:
        for name, tensor in (("x", x), ("weight", weight)):
            _check(tensor.dim() == 2, f"{name}: shape {tuple(tensor.shape)}, needs two dimensions")
            _check(
                tensor.is_cuda and tensor.device.index == self._library.device,
                f"{name}: on {tensor.device}, the kernels are on cuda:{self._library.device}",
            )
            _check(tensor.dtype in _SCALARS, f"{name}: {tensor.dtype}, needs bfloat16 or float16")
            _check_layout(name, tensor)
        (m, k), (n, weight_k) = x.shape, weight.shape
        _check(weight.dtype == x.dtype, f"weight: {weight.dtype}, x is {x.dtype}")
        _check(weight_k == k, f"weight: shape {(n, weight_k)}, x has {k} columns")
        _check(1 <= m <= self.max_rows, f"x: {m} rows, takes 1 to {self.max_rows}")
        _check(k > 0 and k % _VECTOR == 0, f"x: {k} columns, needs a multiple of {_VECTOR}")
        _check(n > 0, "weight: no rows")
        _check(not gated or n % 2 == 0, f"weight: {n} rows, gated needs an even number")
        _check(self._takes(m, n, gated), f"weight: {n} rows, gated needs a multiple of 16 here")
        return m, k


def _macros(
    plan: Skinny | Tiled, dtype: torch.dtype, norm: bool, residual: bool, gated: bool
) -> dict[str, str | int]:
    fused = {"ADD": int(residual), "GATED": int(gated)}
    if isinstance(plan, Skinny):
        fused["NORM"] = int(norm)
    return {"SCALAR": _SCALARS[dtype], **plan.macros(), **fused}


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise KernelError(message)


def _check_layout(name: str, tensor: Tensor) -> None:
    _check(tensor.is_contiguous(), f"{name}: strides {tensor.stride()}, needs contiguous")
    _check(tensor.data_ptr() % 16 == 0, f"{name}: its address is not 16-byte aligned")


def _check_like(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    _check(tuple(tensor.shape) == shape, f"{name}: shape {tuple(tensor.shape)}, needs {shape}")
    _check(tensor.dtype == x.dtype, f"{name}: {tensor.dtype}, x is {x.dtype}")
    _check(tensor.device == x.device, f"{name}: on {tensor.device}, x is on {x.device}")
    _check_layout(name, tensor)
