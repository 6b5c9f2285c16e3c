"""The skinny products against float64, and their boundaries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zllm.cuda.compiler import Compiler
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.linear import _SOURCE, Plan, SkinnyLinear, _defines, plan_for
from zllm.errors import KernelError

ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90a"]
MODEL_ROWS = [1024, 2560, 4096, 6144, 19456, 151936]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("m", [1, 16])
def test_every_architecture_compiles_each_plan(arch: str, m: int, tmp_path: Path) -> None:
    compiler = Compiler(arch, tmp_path)
    for plan in {plan_for(m, n, 132, arch == "sm_90a") for n in MODEL_ROWS}:
        cubin = compiler.compile(_SOURCE, _defines(plan, torch.bfloat16, True, True, True))
        assert cubin.startswith(b"\x7fELF")
    assert compiler.compile(_SOURCE, _defines(plan, torch.float16, False, False, False))


@pytest.mark.parametrize("m", [1, 8, 9, 16])
@pytest.mark.parametrize("n", MODEL_ROWS)
def test_a_plan_lets_two_blocks_share_a_hopper_multiprocessor(m: int, n: int) -> None:
    plan = plan_for(m, n, 132, hopper=True).fit(113 * 1024)
    assert plan.stages >= 3
    assert 2 * (plan.shared_bytes(norm=True) + 1024) <= 228 * 1024


def test_fewer_stages_where_shared_memory_is_small() -> None:
    plan = Plan(2, 1, 1, 8, 1, 5)
    small = plan.fit(99 * 1024)
    assert small.shared_bytes(norm=True) <= 99 * 1024 < plan.shared_bytes(norm=True)
    assert small.stages == 4


@pytest.fixture(scope="module")
def products() -> SkinnyLinear:
    return SkinnyLinear(KernelLibrary())


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def _error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out.double() - expected).norm() / expected.norm()).item()


def _poisoned(m: int, n: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.full((m, n), float("nan"), dtype=dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "k"),
    [(1, 8), (7, 24), (133, 40), (1024, 2048), (1000, 1032), (2560, 9728), (6151, 2568)],
)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 9, 13, 16])
def test_equals_float64(products: SkinnyLinear, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, weight = _random(m, k, dtype=dtype), _random(n, k, dtype=dtype, scale=k**-0.5)
    out = products.linear(x, weight, _poisoned(m, n, dtype))
    expected = x.double() @ weight.double().t()
    assert _error(out, expected) < (3e-3 if dtype == torch.bfloat16 else 4e-4)
    assert torch.equal(out, products.linear(x, weight)), "same input, other bits"


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(24, 72), (2048, 1024), (12290, 2056)])
@pytest.mark.parametrize("m", [1, 6, 8, 11, 16])
def test_fused_parts_equal_their_separate_float64(
    products: SkinnyLinear, m: int, n: int, k: int
) -> None:
    x, weight = _random(m, k, scale=3.0), _random(n, k, scale=k**-0.5)
    norm = 1 + _random(k, scale=0.3)
    y = x.double() * torch.rsqrt(x.double().square().mean(1, keepdim=True) + 1e-5)
    y = (y * norm.double()) @ weight.double().t()

    residual = _random(m, n)
    out = products.linear(x, weight, _poisoned(m, n), norm=norm, eps=1e-5, residual=residual)
    assert _error(out, y + residual.double()) < 6e-3

    gate, up = y.chunk(2, dim=1)
    out = products.linear(x, weight, _poisoned(m, n // 2), norm=norm, eps=1e-5, gated=True)
    assert _error(out, torch.nn.functional.silu(gate) * up) < 9e-3

    stream = residual.clone()
    products.linear(x, weight, stream, residual=stream)
    assert _error(stream, x.double() @ weight.double().t() + residual.double()) < 3e-3


@pytest.mark.gpu
def test_a_chain_in_a_graph_sees_each_product_before_it(products: SkinnyLinear) -> None:
    weights = [_random(1024, 1024, scale=1024**-0.5) for _ in range(24)]
    x = _random(4, 1024)

    def chain(y: torch.Tensor) -> torch.Tensor:
        for weight in weights:
            y = products.linear(y, weight)
        return y

    one_by_one = x
    for weight in weights:
        one_by_one = products.linear(one_by_one, weight)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(x)
    for _ in range(20):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, one_by_one)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": (17, 64)}, "x: 17 rows"),
        ({"x": (2, 60), "weight": (32, 60)}, "x: 60 columns"),
        ({"weight": (32, 72)}, "weight: shape"),
        ({"out": (2, 31)}, "out: shape"),
        ({"residual": (1, 32)}, "residual: shape"),
        ({"norm": (32,)}, "norm: shape"),
    ],
)
def test_a_wrong_shape_is_named(
    products: SkinnyLinear, change: dict[str, tuple[int, ...]], says: str
) -> None:
    shapes = {"x": (2, 64), "weight": (32, 64)} | change
    tensors = {name: _random(*shape) for name, shape in shapes.items()}
    with pytest.raises(KernelError, match=says):
        products.linear(**tensors)


@pytest.mark.gpu
def test_a_wrong_dtype_or_stride_is_named(products: SkinnyLinear) -> None:
    x, weight = _random(2, 64), _random(32, 64)
    with pytest.raises(KernelError, match=r"x: torch\.float32"):
        products.linear(x.float(), weight)
    with pytest.raises(KernelError, match=r"weight: torch\.float16"):
        products.linear(x, weight.half())
    with pytest.raises(KernelError, match="weight: strides"):
        products.linear(x, _random(64, 32).t())
    with pytest.raises(KernelError, match="norm: fused for bfloat16 only"):
        products.linear(x.half(), weight.half(), norm=_random(64).half())


@pytest.mark.gpu
def test_supports_only_what_it_computes_faster(products: SkinnyLinear) -> None:
    assert products.supports(1, 151936, 4096, torch.bfloat16)
    assert products.supports(16, 1024, 2048, torch.float16)
    assert not products.supports(16, 151936, 4096, torch.bfloat16)
    assert not products.supports(17, 1024, 2048, torch.bfloat16)
    assert not products.supports(1, 1024, 2048, torch.float32)
    assert not products.supports(1, 1024, 2044, torch.bfloat16)
