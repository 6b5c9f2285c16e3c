"""SwiGLU's gate and row gathers against torch."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.accuracy import TOLERANCE, poisoned, relative_error
from zllm.cuda.activation import silu_mul
from zllm.cuda.embedding import take_rows
from zllm.cuda.launcher import KernelLibrary
from zllm.errors import KernelError

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "inter"), [pytest.param(3, 3072, id="small"), (1, 64), (257, 9728), (4100, 3072)]
)
def test_silu_mul(kernels: KernelLibrary, rows: int, inter: int, dtype: torch.dtype) -> None:
    gate_up = (torch.randn(rows, 2 * inter, device="cuda") * 4).to(dtype)
    out = silu_mul(kernels, gate_up, out=poisoned(rows, inter, dtype=dtype))
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert relative_error(out, torch.nn.functional.silu(gate) * up) < TOLERANCE[dtype]


def test_silu_mul_far_from_zero_is_the_limit_small(kernels: KernelLibrary) -> None:
    gate = torch.tensor([-200.0, -90.0, 90.0, 200.0], device="cuda").repeat(2)
    out = silu_mul(kernels, torch.cat([gate, torch.ones_like(gate)])[None])
    assert torch.equal(out[0], gate.clamp(min=0))


def test_silu_mul_refuses_halves_that_do_not_align(kernels: KernelLibrary) -> None:
    with pytest.raises(KernelError, match="gate_up has 12 columns"):
        silu_mul(kernels, torch.zeros(1, 12, device="cuda"))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("count", "width"), [pytest.param(5, 1024, id="small"), (1, 8), (300, 5120)]
)
def test_take_rows(kernels: KernelLibrary, count: int, width: int, dtype: torch.dtype) -> None:
    table = torch.randn(1000, width, device="cuda").to(dtype)
    index = torch.randint(1000, (count,), dtype=torch.int32, device="cuda")
    out = take_rows(kernels, table, index, out=poisoned(count, width, dtype=dtype))
    assert torch.equal(out, table[index.long()])


def test_take_rows_gives_zeros_for_what_is_no_row_small(kernels: KernelLibrary) -> None:
    table = torch.randn(10, 64, device="cuda")
    index = torch.tensor([-1, 9, 10], dtype=torch.int32, device="cuda")
    out = take_rows(kernels, table, index)
    assert torch.equal(out, torch.stack([torch.zeros_like(table[9]), table[9], out[0]]))
