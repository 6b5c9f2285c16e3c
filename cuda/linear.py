"""Matrix products with few rows: y = x W^T as a decode step needs it, at the speed of reading W.

`supports` says where this beats cuBLAS, by measurement (docs/decisions/060-skinny-linear.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zllm.cuda.compiler import Program
from zllm.cuda.launcher import KernelLibrary
from zllm.errors import KernelError

_SOURCE, _FUNCTION = "linear_skinny.cu", "linear_skinny"
_SCALARS = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
_VECTOR = 8
"""Elements in the 16 bytes that one asynchronous copy moves."""
_SHARED_BYTES = 113 * 1024
"""What lets a block share its multiprocessor with one of the kernel that follows (228 KiB)."""


@dataclass(frozen=True)
class Plan:
    """How one product is cut: the macros of linear_skinny.cu."""

    mtiles: int
    ntiles: int
    warps_n: int
    warps_k: int
    slabs: int
    stages: int
    cluster: int = 1

    @property
    def threads(self) -> int:
        return 32 * self.warps_n * self.warps_k

    def shared_bytes(self, norm: bool) -> int:
        """Dynamic shared memory: the rings, the partial sums and the sums of squares."""
        rows, columns = 16 * self.mtiles * self.warps_n, 8 * self.ntiles
        ring = self.stages * self.slabs * 64 * (rows + columns + norm)
        return self.warps_k * (ring + columns * (rows + 4) * 4 + columns * 4)

    def fit(self, limit: int) -> Plan:
        """The same with as few stages less as `limit` bytes of shared memory ask for."""
        plan = self
        while plan.shared_bytes(norm=True) > limit:
            plan = replace(plan, stages=plan.stages - 1)
        return plan


def plan_for(m: int, n: int, num_sms: int, hopper: bool) -> Plan:
    """The fastest cut that was measured for m rows of x and n of W."""
    rows = n / num_sms
    if m <= 8:
        return Plan(1, 1, 1, 8, 2, 4) if rows <= 16 else Plan(2, 1, 1, 8, 1, 5)
    if rows <= 16:
        return Plan(1, 2, 1, 8, 1, 6, cluster=2 if hopper else 1)
    return Plan(2, 2, 2, 4, 1, 4, cluster=2 if hopper and rows <= 31.5 else 1)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise KernelError(message)


class SkinnyLinear:
    """Products of one device. `programs` names what to compile ahead of the first call."""

    MAX_ROWS = 16

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library
        properties: Any = torch.cuda.get_device_properties(library.device)
        self._hopper: bool = properties.major == 9
        self._limit = min(_SHARED_BYTES, properties.shared_memory_per_block_optin)

    def supports(self, m: int, n: int, k: int, dtype: torch.dtype) -> bool:
        """Whether [m, k] x [n, k]^T is computed here, and faster than by cuBLAS."""
        if dtype not in _SCALARS or k % _VECTOR or n < self._library.num_sms:
            return False
        # cuBLAS, too, reads a large weight at full speed once it has 16 rows to fill a tile with.
        return 1 <= m <= 8 or (8 < m <= self.MAX_ROWS and n * k <= 20_000_000)

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
        1 <= M <= 16 and K a multiple of 8 works, `supports` or not.

        Fused, each optional: `norm` [K] applies RMSNorm (Zhang & Sennrich 2019) with `eps` to the
        rows of x first (bfloat16 only: x * norm must not overflow); `gated` takes the first half
        of weight as gate and the second as up and gives silu(gate) * up, [M, N / 2] (Shazeer
        2020); `residual` of out's shape is added last and may be `out` itself.
        """
        m, k = self._check_operands(x, weight)
        n = weight.shape[0] // 2 if gated else weight.shape[0]
        if out is None:
            out = torch.empty(m, n, dtype=x.dtype, device=x.device)
        _check_like("out", out, x, (m, n))
        if residual is not None:
            _check_like("residual", residual, x, (m, n))
        if norm is not None:
            _check_like("norm", norm, x, (k,))
            _check(x.dtype == torch.bfloat16, f"norm: fused for bfloat16 only, x is {x.dtype}")
        _check(not gated or weight.shape[0] % 2 == 0, "weight: gated needs an even number of rows")
        fused = norm is not None, residual is not None, gated
        plan = self._plan(m, weight.shape[0])
        kernel = self._library.get(_SOURCE, _FUNCTION, _defines(plan, x.dtype, *fused))
        owners = min(n, self._library.num_sms // plan.cluster)
        kernel.launch(
            (owners * plan.cluster, 1, 1),
            (plan.threads, 1, 1),
            (x, weight, out, residual, norm, float(eps), m, n, k),
            shared_bytes=plan.shared_bytes(norm is not None),
            pdl=self._library.pdl,
        )
        return out

    def programs(
        self,
        n: int,
        dtype: torch.dtype,
        *,
        norm: bool = False,
        residual: bool = False,
        gated: bool = False,
    ) -> list[Program]:
        """The programs that products with an [n, K] weight need, whatever M."""
        plans = {self._plan(m, n) for m in (8, 16)}
        return [Program(_SOURCE, _defines(p, dtype, norm, residual, gated)) for p in plans]

    def _plan(self, m: int, n: int) -> Plan:
        return plan_for(m, n, self._library.num_sms, self._hopper).fit(self._limit)

    def _check_operands(self, x: Tensor, weight: Tensor) -> tuple[int, int]:
        for name, tensor in (("x", x), ("weight", weight)):
            _check(tensor.dim() == 2, f"{name}: shape {tuple(tensor.shape)}, needs two dimensions")
            _check(
                tensor.device.index == self._library.device and tensor.is_cuda,
                f"{name}: on {tensor.device}, the kernels are on cuda:{self._library.device}",
            )
            _check(tensor.dtype in _SCALARS, f"{name}: {tensor.dtype}, needs bfloat16 or float16")
            _check(tensor.is_contiguous(), f"{name}: strides {tensor.stride()}, needs contiguous")
            _check(tensor.data_ptr() % 16 == 0, f"{name}: its address is not 16-byte aligned")
        (m, k), (n, weight_k) = x.shape, weight.shape
        _check(weight.dtype == x.dtype, f"weight: {weight.dtype}, x is {x.dtype}")
        _check(weight_k == k, f"weight: shape {(n, weight_k)}, x has {k} columns")
        _check(1 <= m <= self.MAX_ROWS, f"x: {m} rows, takes 1 to {self.MAX_ROWS}")
        _check(k > 0 and k % _VECTOR == 0, f"x: {k} columns, needs a multiple of {_VECTOR}")
        _check(n > 0, "weight: no rows")
        return m, k


def _defines(
    plan: Plan, dtype: torch.dtype, norm: bool, residual: bool, gated: bool
) -> dict[str, Any]:
    return {
        "SCALAR": _SCALARS[dtype],
        "MTILES": plan.mtiles,
        "NTILES": plan.ntiles,
        "WARPS_N": plan.warps_n,
        "WARPS_K": plan.warps_k,
        "SLABS": plan.slabs,
        "STAGES": plan.stages,
        "CLUSTER": plan.cluster,
        "NORM": int(norm),
        "ADD": int(residual),
        "GATED": int(gated),
    }


def _check_like(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    _check(tuple(tensor.shape) == shape, f"{name}: shape {tuple(tensor.shape)}, needs {shape}")
    _check(tensor.dtype == x.dtype, f"{name}: {tensor.dtype}, x is {x.dtype}")
    _check(tensor.device == x.device, f"{name}: on {tensor.device}, x is on {x.device}")
    _check(tensor.is_contiguous(), f"{name}: strides {tensor.stride()}, needs contiguous")
    _check(tensor.data_ptr() % 16 == 0, f"{name}: its address is not 16-byte aligned")
