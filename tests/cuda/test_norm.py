"""RMSNorm against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.accuracy import TOLERANCE, poisoned, relative_error
from zllm.cuda.embedding import embed_scaled, take_rows
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.norm import add_rms_norm, rms_norm
from zllm.errors import KernelError

pytestmark = pytest.mark.gpu
SHAPES = [
    pytest.param(3, 1024, id="small"),
    (1, 64),
    (256, 2560),
    (2048, 1024),
    (2500, 5120),
    (5, 12288),
]


def _reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "hidden"), SHAPES)
def test_rms_norm(kernels: KernelLibrary, rows: int, hidden: int, dtype: torch.dtype) -> None:
    x = (torch.randn(rows, hidden, device="cuda") * 3).to(dtype)
    weight = torch.randn(hidden, device="cuda").to(dtype)
    out = rms_norm(kernels, x, weight, 1e-6, out=poisoned(rows, hidden, dtype=dtype))
    assert relative_error(out, _reference(x, weight, 1e-6)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "hidden"), SHAPES)
def test_add_rms_norm_updates_the_residual_and_norms_what_it_stored(
    kernels: KernelLibrary, rows: int, hidden: int, dtype: torch.dtype
) -> None:
    x, residual = (torch.randn(2, rows, hidden, device="cuda") * 3).to(dtype)
    weight = torch.randn(hidden, device="cuda").to(dtype)
    total = x + residual
    out = add_rms_norm(kernels, x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    assert relative_error(out, _reference(total, weight, 1e-5)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("count", "hidden"), [pytest.param(9, 64, id="small"), (64, 1024), (256, 2560), (17, 12288)]
)
def test_an_embedding_leaves_what_the_norm_behind_it_needs(
    kernels: KernelLibrary, count: int, hidden: int
) -> None:
    table = (torch.randn(500, hidden, device="cuda") * 3).bfloat16()
    gains = torch.randn(hidden, device="cuda").bfloat16()
    tokens = torch.randint(500, (count,), dtype=torch.int32, device="cuda")
    tokens[3], tokens[5] = -1, 500
    x, left = embed_scaled(kernels, table, tokens, gains)
    assert torch.equal(x, take_rows(kernels, table, tokens))
    assert not x[3].any()
    assert not x[5].any()
    assert torch.equal(left.rows, x * gains)
    assert left.squares.shape == (1, count)
    assert relative_error(left.squares[0], x.double().square().sum(-1)) < 1e-5


def test_no_rows_are_fine(kernels: KernelLibrary) -> None:
    x = torch.empty(0, 1024, device="cuda")
    assert rms_norm(kernels, x, torch.ones(1024, device="cuda"), 1e-6).shape == (0, 1024)


def test_an_argument_that_does_not_fit_is_named(kernels: KernelLibrary) -> None:
    x = torch.randn(4, 1024, device="cuda")
    weight = torch.ones(1024, device="cuda")
    for name, arguments in {
        "x is torch.float64": (x.double(), weight),
        "x is on cpu": (x.cpu(), weight),
        "x has strides": (x.t().contiguous().t(), weight),
        "x has rows of 30": (x[:, :30].contiguous(), weight[:30]),
        "weight has shape": (x, weight[:8]),
        "weight is torch.bfloat16": (x, weight.bfloat16()),
    }.items():
        with pytest.raises(KernelError, match=name):
            rms_norm(kernels, *arguments, 1e-6)
