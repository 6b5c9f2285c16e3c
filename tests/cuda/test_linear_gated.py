"""SwiGLU's products with many rows against float64, and their boundaries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda.accuracy import TOLERANCE, poisoned, relative_error
from zllm.cuda.compiler import Compiler
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.linear_gated import GatedLinear, program, useful_share
from zllm.errors import KernelError

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_hopper_compiles_it(dtype: torch.dtype, tmp_path: Path) -> None:
    which = program(dtype)
    cubin = Compiler("sm_90a", tmp_path).compile(which.source, which.defines)
    assert cubin.startswith(b"\x7fELF")


def test_what_is_computed_in_vain_counts() -> None:
    assert useful_share(8192, 96 * 33, clusters=66) == 1.0
    assert useful_share(8192 - 128, 96 * 33, clusters=66) == 1.0 - 1 / 64
    assert useful_share(256, 96, clusters=66) == 1 / 66
    a_round_more = (96 * 33 + 32) / (96 * 33) * 16 / 17
    assert useful_share(8192, 96 * 33 + 32, clusters=66) == pytest.approx(a_round_more)


@pytest.fixture(scope="module")
def products(kernels: KernelLibrary) -> GatedLinear:
    products = GatedLinear(kernels)
    if not products.available:
        pytest.skip("these products are for Hopper")
    return products


def _random(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def _expected(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = (x.double() @ weight.double().t()).chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("m", "inter", "k"),
    [
        pytest.param(300, 64, 136, id="small"),
        (8, 512, 64),  # one step of k, most rows outside
        (1061, 1024, 3072),
        (8192, 2560, 1024),  # several tiles for each warpgroup
        (777, 4128, 4096),  # the last tile of columns is not full
    ],
)
def test_product(products: GatedLinear, dtype: torch.dtype, m: int, inter: int, k: int) -> None:
    x, weight = _random(m, k, dtype=dtype), _random(2 * inter, k, dtype=dtype, scale=0.05)
    out = products.linear(x, weight, poisoned(m, inter, dtype=dtype))
    assert relative_error(out, _expected(x, weight)) < TOLERANCE[dtype]


@pytest.mark.gpu
def test_the_same_bits_each_time_and_in_a_graph(products: GatedLinear) -> None:
    x, weight = _random(4096, 1024), _random(6144, 1024)
    first = products.linear(x, weight)
    for _ in range(10):
        assert torch.equal(products.linear(x, weight), first)
    graph, out = torch.cuda.CUDAGraph(), torch.zeros_like(first)
    with torch.cuda.graph(graph):
        for _ in range(3):
            products.linear(x, weight, out)
    graph.replay()
    assert torch.equal(out, first)


@pytest.mark.gpu
def test_few_rows_and_float32_are_left_to_others(products: GatedLinear) -> None:
    assert products.supports(8192, 24576, 4096, BF16)
    assert not products.supports(256, 24576, 4096, BF16)
    assert not products.supports(8192, 24576, 4096, torch.float32)


@pytest.mark.gpu
def test_boundaries_name_the_argument(products: GatedLinear) -> None:
    x, weight = _random(512, 256), _random(128, 256)
    with pytest.raises(KernelError, match=r"weight has shape \[128, 128\]"):
        products.linear(x, weight[:, :128].contiguous())
    with pytest.raises(KernelError, match="weight has 96 rows"):
        products.linear(x, weight[:96].contiguous())
    with pytest.raises(KernelError, match=r"out has shape \[512, 128\]"):
        products.linear(x, weight, x[:, :128].contiguous())
    with pytest.raises(KernelError, match=r"x is torch\.float32"):
        products.linear(x.float(), weight)
