"""RMSNorm on the device (kernels/norm.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from zllm.cuda.checks import FLOATS, SCALARS, require, require_vectors
from zllm.cuda.compiler import Program
from zllm.cuda.launcher import KernelLibrary

_MANY_ROWS = 2048


def _threads(dtype: torch.dtype, hidden: int, rows: int) -> int:
    """One vector a thread ends a short launch soonest; where rows queue for the multiprocessors,
    two or three a thread keep more loads in flight."""
    vectors = -(-hidden * dtype.itemsize // 16)
    share = 2 if rows >= _MANY_ROWS else 1
    share = max(share, -(-vectors // 1024))
    return -(-vectors // share // 32) * 32 or 32


def program(dtype: torch.dtype, hidden: int, rows: int) -> Program:
    """The program for `rows` rows; there are two, one for few rows and one for many."""
    threads = _threads(dtype, hidden, rows)
    return Program("norm.cu", {"SCALAR": SCALARS[dtype], "HIDDEN": hidden, "THREADS": threads})


def rms_norm(
    kernels: KernelLibrary, x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """[P, H], [H] -> [P, H]: x / sqrt(mean(x^2) + eps) * weight, float32 inside. `out` may be
    `x`."""
    rows, hidden, out = _check(kernels, x, weight, out)
    which = program(x.dtype, hidden, rows)
    kernels.get(which.source, "rms_norm", which.defines).launch(
        (rows, 1, 1), (int(which.defines["THREADS"]), 1, 1), (out, x, weight, eps), pdl=kernels.pdl
    )
    return out


def add_rms_norm(
    kernels: KernelLibrary,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """[P, H], [P, H], [H] -> [P, H]: residual += x in place, then rms_norm(residual). `out` may
    be `x`."""
    rows, hidden, out = _check(kernels, x, weight, out)
    require("residual", residual, (x.dtype,), (rows, hidden), kernels.device)
    require_vectors("residual", residual)
    which = program(x.dtype, hidden, rows)
    kernels.get(which.source, "add_rms_norm", which.defines).launch(
        (rows, 1, 1),
        (int(which.defines["THREADS"]), 1, 1),
        (out, x, residual, weight, eps),
        pdl=kernels.pdl,
    )
    return out


def _check(
    kernels: KernelLibrary, x: Tensor, weight: Tensor, out: Tensor | None
) -> tuple[int, int, Tensor]:
    require("x", x, FLOATS, (None, None), kernels.device)
    require_vectors("x", x)
    rows, hidden = x.shape
    require("weight", weight, (x.dtype,), (hidden,), kernels.device)
    require_vectors("weight", weight)
    if out is None:
        out = torch.empty_like(x)
    else:
        require("out", out, (x.dtype,), (rows, hidden), kernels.device)
        require_vectors("out", out)
    return rows, hidden, out
