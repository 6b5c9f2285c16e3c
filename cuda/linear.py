"""Matrix products with few rows: y = x W^T as a decode step needs it, at the speed of reading W.

`supports` says where this beats cuBLAS, by measurement (linear_plans.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    is_head,
    qkv_plan,
    skinny_plan,
    tiled_plan,
    tiles_are_faster,
)
from zllm.cuda.logit_chunks import CHUNK, LogitChunks
from zllm.cuda.occupancy import bytes_for_at_most
from zllm.cuda.rope_cache import RopeCache
from zllm.cuda.tensor_map import TensorMaps
from zllm.errors import KernelError

_SKINNY = "linear_skinny.cu", "linear_skinny"
_TILED = "linear_wgmma.cu", "linear_wgmma"
_SCALARS = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
HEAD_DIM = 128
"""Of the heads that `qkv_of_scaled` takes."""
_VECTOR = 8
"""Elements in the 16 bytes that one copy moves at least."""


@dataclass(frozen=True, slots=True)
class ScaledRows:
    """A residual h as the product behind its RMSNorm takes it (decision 074)."""

    rows: Tensor
    """[M, K]: h * gains."""
    squares: Tensor
    """float32 [parts, M]: each row's sum of h^2 over a part of its columns."""


class SkinnyLinear:
    """Products of one device. `programs` names what to compile ahead of the first call."""

    MAX_NORM_ROWS = 8
    """Rows of x that `linear` takes with `norm`; else the product before leaves what the norm needs
    (`add_linear_scaled`), or the norm is a kernel of its own."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library
        most = library.device_attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        self._limit = min(SHARED_BYTES, most)
        per_sm = library.device_attribute("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR")
        self._alone = bytes_for_at_most(1, per_sm)
        self.max_rows = TILE_ROWS[-1] if library.hopper else 16
        """Rows of x that `linear` takes."""
        self._maps = TensorMaps()

    def supports(self, m: int, n: int, k: int, dtype: torch.dtype, gated: bool = False) -> bool:
        """Whether [m, k] x [n, k]^T is computed here, and faster than by cuBLAS."""
        return (
            self._takes(m, n, gated)
            and dtype in _SCALARS
            and k % _VECTOR == 0
            and faster_than_cublas(m, n, k, self._library.num_sms, self._library.hopper)
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
        chunks: LogitChunks | None = None,
    ) -> Tensor:
        """[M, K], [N, K] -> [M, N] in x's dtype: x weight^T, summed in float32. Any shape with
        1 <= M <= max_rows and K a multiple of 8 works, `supports` or not.

        Fused, each optional: `norm` [K] applies RMSNorm (Zhang & Sennrich 2019) with `eps` to the
        rows of x first (bfloat16, as x * norm must not overflow, and up to MAX_NORM_ROWS); `gated`
        takes the first half of weight as gate and the second as up and gives silu(gate) * up,
        [M, N / 2] (Shazeer 2020); `residual` of out's shape is added last and may be `out` itself;
        `chunks` is filled, where `leaves_chunks`.
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

        plan = self._plan(m, weight.shape[0], k, gated, norm is not None)
        if isinstance(plan, Tiled):
            self._launch_tiled(plan, x, weight, out, residual=residual, gated=gated, chunks=chunks)
            return out
        _check(chunks is None, f"chunks: not left by a product of {m} rows")
        macros = _macros(plan, x.dtype, norm is not None, residual is not None, gated)
        blocks = min(n, self._library.num_sms)
        shared_bytes = plan.shared_bytes(norm is not None)
        if is_head(n, self._library.num_sms):
            # Nothing long comes before it, beside which blocks would start one by one.
            shared_bytes = max(shared_bytes, self._alone)
        self._library.get(*_SKINNY, macros).launch(
            (blocks, 1, 1),
            (plan.threads, 1, 1),
            (x, weight, out, residual, norm, float(eps), m, n, k),
            shared_bytes=shared_bytes,
            pdl=self._library.pdl,
        )
        return out

    def supports_scaled(self, m: int, n: int, k: int, dtype: torch.dtype) -> bool:
        """Whether `add_linear_scaled` and `linear_of_scaled` take [m, k] x [n, k]^T, and norms are
        faster so."""
        aligned = n % (2 * UNIT) == 0 and dtype == torch.bfloat16  # h * gains must not overflow
        return aligned and self.supports(m, n, k, dtype, gated=True) and self._is_tiled(m, n, k)

    def add_linear_scaled(
        self, residual: Tensor, x: Tensor, weight: Tensor, gains: Tensor
    ) -> ScaledRows:
        """[M, N] += [M, K] x [N, K]^T in place, where `supports_scaled`. Gives what
        `linear_of_scaled` needs instead of rms_norm(residual, gains [N])."""
        m, k = self._check_operands(x, weight, gated=False)
        n = weight.shape[0]
        self._check_scaled(m, n, k, x.dtype)
        _check_like("residual", residual, x, (m, n))
        _check_like("gains", gains, x, (n,))
        plan = self._tiled_plan(m, n, k, gated=False)
        scaled = ScaledRows(
            torch.empty_like(residual),
            torch.empty(plan.parts(n), m, dtype=torch.float32, device=x.device),
        )
        self._launch_tiled(plan, x, weight, residual, residual=residual, scaled=scaled, gains=gains)
        return scaled

    def linear_of_scaled(
        self,
        x: ScaledRows,
        weight: Tensor,
        *,
        eps: float,
        gated: bool = False,
        chunks: LogitChunks | None = None,
    ) -> Tensor:
        """linear(rms_norm(h, gains, eps), weight, gated=gated, chunks=chunks) of the residual h
        that x is of."""
        m, k = self._check_scaled_rows(x, weight, gated)
        n = weight.shape[0]
        out = torch.empty(m, n // 2 if gated else n, dtype=x.rows.dtype, device=x.rows.device)
        plan = self._tiled_plan(m, n, k, gated)
        self._launch_tiled(plan, x.rows, weight, out, normed=x, eps=eps, gated=gated, chunks=chunks)
        return out

    def leaves_chunks(self, m: int, n: int, k: int, dtype: torch.dtype) -> bool:
        """Whether `linear` of these sizes, without a norm, and `linear_of_scaled` may leave
        LogitChunks."""
        if not self.supports(m, n, k, dtype) or not self._is_tiled(m, n, k):
            return False
        return _leaves_chunks(self._tiled_plan(m, n, k, gated=False))

    def takes_norms(self, m: int, dtype: torch.dtype) -> bool:
        """Whether a product with m rows takes a norm that was left, whatever W is."""
        some = self.MAX_NORM_ROWS < m <= self.max_rows
        return self._library.hopper and some and dtype == torch.bfloat16

    def supports_qkv(self, m: int, n: int, k: int, head_dim: int, dtype: torch.dtype) -> bool:
        """Whether `qkv_of_scaled` takes [m, k] x [n, k]^T, and is faster than two kernels."""
        fits = head_dim == HEAD_DIM and self.supports_scaled(m, n, k, dtype)
        return fits and qkv_plan(m, n, k, self._library.num_sms) is not None

    def qkv_of_scaled(
        self, x: ScaledRows, weight: Tensor, rope: RopeCache, *, eps: float, early: bool = False
    ) -> Tensor:
        """`rope_cache` of linear_of_scaled(x, weight, eps=eps), where `supports_qkv`: of it, q
        [M, Hq, D] alone is written beside the cache. Sums are not rounded before they are
        normalized. `early`: as in `rope_cache`."""
        m, k = self._check_scaled_rows(x, weight)
        n, dtype = weight.shape[0], x.rows.dtype
        plan = qkv_plan(m, n, k, self._library.num_sms)
        if plan is None or rope.head_dim != HEAD_DIM or rope.width != n:
            raise KernelError(f"weight: {(n, k)} for {m} rows and {rope.width} of all heads")
        rope.check(m, dtype, self._library.device)
        out = torch.empty(m, rope.num_heads, HEAD_DIM, dtype=dtype, device=x.rows.device)
        self._launch_tiled(plan, x.rows, weight, out, normed=x, eps=eps, rope=rope, early=early)
        return out

    def _launch_tiled(
        self,
        plan: Tiled,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        *,
        residual: Tensor | None = None,
        scaled: ScaledRows | None = None,
        gains: Tensor | None = None,
        normed: ScaledRows | None = None,
        eps: float = 0.0,
        gated: bool = False,
        rope: RopeCache | None = None,
        early: bool = False,
        chunks: LogitChunks | None = None,
    ) -> None:
        m, k = x.shape
        n = weight.shape[0] // 2 if gated else weight.shape[0]
        x_rows = plan.x_rows(m)
        x_map = self._maps.get(x, (k, m), (k,), (plan.DEPTH, x_rows))
        if gated:
            sizes, box = (k, 8, 2, n // 8), (plan.DEPTH, 8, 2, plan.columns // (2 * UNIT))
            w_map = self._maps.get(weight, sizes, (k, n * k, 8 * k), box)
        else:
            w_map = self._maps.get(weight, (k, n), (k,), (plan.DEPTH, plan.columns))
        norm = normed is not None
        macros = _macros(plan, x.dtype, norm, residual is not None, gated, scaled is not None)
        further: tuple[Any, ...] = ()
        if rope is not None:
            macros |= {"QKV": 1} | rope.macros
            further = (*rope.arguments(), int(early))
        if chunks is not None:
            fills = _leaves_chunks(plan) and residual is None and not gated
            _check(fills, f"chunks: not left by a product of {(m, k)} and {tuple(weight.shape)}")
            macros["SAMPLED"] = 1
            further = chunks.arguments(m, n, self._library.device)
        left = scaled or normed
        squares, parts = (left.squares, left.squares.shape[0]) if left else (None, 0)
        rows = scaled.rows if scaled else None
        self._library.get(*_TILED, macros).launch(
            plan.grid(m, weight.shape[0]),
            (plan.threads, 1, 1),
            (
                *(x_map, w_map, out, residual, rows, gains, squares, parts, eps),
                *(m, n, k, x_rows),
                *further,
            ),
            shared_bytes=plan.shared_bytes,
            pdl=self._library.pdl,
        )

    def programs(
        self,
        n: int,
        k: int,
        dtype: torch.dtype,
        *,
        norm: bool = False,
        residual: bool = False,
        gated: bool = False,
        left: bool = True,
        head: bool = False,
        heads: Mapping[str, str | int] | None = None,
    ) -> Iterator[Program]:
        """The programs that a model's products with an [n, k] weight need, whatever M; none for
        what is cuBLAS's.

        norm: one stands before it, `left` by the product before where that can. residual: it is
        added to. head: its logits are sampled by, and it may be a graph of its own, where nothing
        is left to it. heads: what `qkv_of_scaled` is told, `rope_cache.head_macros`; None where it
        cannot be used.
        """
        found: list[Program] = []
        sizes = (8, *TILE_ROWS) if self._library.hopper else (8, 16)
        for fewest, m in zip((1, *(size + 1 for size in sizes)), sizes, strict=False):
            if not self._takes(m, n, gated) or not self.supports(fewest, n, k, dtype, gated):
                continue
            few = m <= self.MAX_NORM_ROWS
            fused = left and (norm or residual) and self.supports_scaled(m, n, k, dtype)
            sampled = int(head and not few and self.leaves_chunks(m, n, k, dtype))
            if not fused or (norm and few) or head:
                plan = self._plan(m, n, k, gated, norm and few)
                macros = _macros(plan, dtype, norm and few, residual, gated)
                if isinstance(plan, Tiled):
                    found.append(Program(_TILED[0], macros | {"SAMPLED": sampled}))
                else:
                    found.append(Program(_SKINNY[0], macros))
            if fused:
                ends = qkv_plan(m, n, k, self._library.num_sms) if heads is not None else None
                tiled = ends or self._tiled_plan(m, n, k, gated)
                macros = _macros(tiled, dtype, norm, residual, gated, scaled=residual)
                macros |= {"SAMPLED": sampled} if ends is None else {"QKV": 1, **(heads or {})}
                found.append(Program(_TILED[0], macros))
        yield from (p for i, p in enumerate(found) if p not in found[:i])

    def _takes(self, m: int, n: int, gated: bool) -> bool:
        return 1 <= m <= self.max_rows and (m <= 16 or not gated or n // 2 % UNIT == 0)

    def _plan(self, m: int, n: int, k: int, gated: bool, norm: bool) -> Skinny | Tiled:
        if self._is_tiled(m, n, k, gated, norm):
            return self._tiled_plan(m, n, k, gated)
        return skinny_plan(m, n, self._library.num_sms).fit(self._limit)

    def _is_tiled(self, m: int, n: int, k: int, gated: bool = False, norm: bool = False) -> bool:
        takes = self._library.hopper and not norm and not (gated and n // 2 % UNIT)
        return takes and tiles_are_faster(m, n, k)

    def _tiled_plan(self, m: int, n: int, k: int, gated: bool) -> Tiled:
        library = self._library
        return tiled_plan(m, n, k, library.num_sms, library.clusters_at_once(4), gated)

    def _check_scaled_rows(
        self, x: ScaledRows, weight: Tensor, gated: bool = False
    ) -> tuple[int, int]:
        m, k = self._check_operands(x.rows, weight, gated)
        self._check_scaled(m, weight.shape[0], k, x.rows.dtype)
        _check(x.squares.shape[1] == m, f"x.squares: of {x.squares.shape[1]} rows, x.rows has {m}")
        return m, k

    def _check_scaled(self, m: int, n: int, k: int, dtype: torch.dtype) -> None:
        supported = self.supports_scaled(m, n, k, dtype)
        _check(supported, f"x, weight: {(m, k)} and {(n, k)} {dtype}, not as supports_scaled says")

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
    plan: Skinny | Tiled,
    dtype: torch.dtype,
    norm: bool,
    residual: bool,
    gated: bool,
    scaled: bool = False,
) -> dict[str, str | int]:
    fused = {"ADD": int(residual), "GATED": int(gated), "NORM": int(norm)}
    if isinstance(plan, Tiled):
        fused |= {"SCALED": int(scaled), "QKV": 0, "SAMPLED": 0}
    return {"SCALAR": _SCALARS[dtype], **plan.macros(), **fused}


def _leaves_chunks(plan: Tiled) -> bool:
    return plan.split == 1 and not plan.swapped and plan.columns % CHUNK == 0


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
