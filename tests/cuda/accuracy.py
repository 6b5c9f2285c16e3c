"""How the kernels' errors are measured, and how small they must be."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
"""Of the relative error against float64: a few roundings of the type."""


def relative_error(out: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what is expected; NaN counts as infinite."""
    if out.isnan().any():
        return float("inf")
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """An output that shows every element that nobody wrote."""
    return torch.full(shape, float("nan"), dtype=dtype, device="cuda")
