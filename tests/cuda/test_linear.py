"""The skinny products against float64, and their boundaries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cuda.rotation import expect_rotated, rope_case
from zllm.cuda.compiler import Compiler
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.linear import ScaledRows, SkinnyLinear, _macros
from zllm.cuda.linear_plans import (
    SHARED_BYTES,
    TILE_ROWS,
    Skinny,
    Tiled,
    faster_than_cublas,
    qkv_plan,
    skinny_plan,
    tiled_plan,
)
from zllm.cuda.rope_cache import head_macros
from zllm.errors import KernelError

ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90a"]
MODEL_WEIGHTS = [(1024, 3072), (2560, 9728), (4096, 1024), (6144, 4096), (24576, 4096)]
SMS, CLUSTERS_OF_4 = 132, 30


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("m", [1, 16])
def test_every_architecture_compiles_the_skinny_plans(arch: str, m: int, tmp_path: Path) -> None:
    compiler = Compiler(arch, tmp_path)
    for plan in {skinny_plan(m, n, SMS) for n, _ in MODEL_WEIGHTS}:
        cubin = compiler.compile(
            "linear_skinny.cu", _macros(plan, torch.bfloat16, True, True, True)
        )
        assert cubin.startswith(b"\x7fELF")
    assert compiler.compile("linear_skinny.cu", _macros(plan, torch.float16, False, False, False))


@pytest.mark.parametrize("m", TILE_ROWS)
def test_hopper_compiles_the_tiled_plans(m: int, tmp_path: Path) -> None:
    compiler = Compiler("sm_90a", tmp_path)
    gated = {tiled_plan(m, n, k, SMS, CLUSTERS_OF_4, gated=True) for n, k in MODEL_WEIGHTS}
    narrow = {tiled_plan(m, n, k, SMS, CLUSTERS_OF_4) for n, k in MODEL_WEIGHTS[:2]}
    every_macros = [
        *(_macros(plan, torch.bfloat16, True, False, True) for plan in gated),
        *(_macros(plan, torch.bfloat16, False, True, False, scaled=True) for plan in narrow),
        _macros(next(iter(gated)), torch.float16, False, True, True),
        _macros(next(iter(narrow)), torch.float16, False, False, False),
    ]
    for macros in every_macros:
        assert compiler.compile("linear_wgmma.cu", macros).startswith(b"\x7fELF")


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float8_e4m3fn])
def test_hopper_compiles_the_qkv_plans(cache: torch.dtype, tmp_path: Path) -> None:
    compiler = Compiler("sm_90a", tmp_path)
    plans = {qkv_plan(m, n, 1024, SMS) for m in (9, *TILE_ROWS) for n in (4096, 6144)} - {None}
    assert plans
    for plan in plans:
        macros = _macros(plan, torch.bfloat16, True, False, False)
        macros |= {"QKV": 1} | head_macros(cache, 16, 8, qk_norm=True)
        assert compiler.compile("linear_wgmma.cu", macros).startswith(b"\x7fELF")


@pytest.mark.parametrize("m", [1, 8, 9, 16])
@pytest.mark.parametrize("n", [1024, 2560, 151936])
def test_a_skinny_plan_lets_two_blocks_share_a_hopper_multiprocessor(m: int, n: int) -> None:
    plan = skinny_plan(m, n, SMS).fit(SHARED_BYTES)
    assert plan.stages >= 3
    assert 2 * (plan.shared_bytes(norm=True) + 1024) <= 228 * 1024


@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 64, 65, 96, 128, 129, 144, 192, 193, 217, 249, 256])
@pytest.mark.parametrize("n", [16, 48, 1024, 1504, 2064, 2560, 4096, 4224, 6144, 19456, 151936])
@pytest.mark.parametrize("k", [64, 1024, 4096])
@pytest.mark.parametrize("gated", [False, True])
def test_a_tiled_plan_covers_the_product(m: int, n: int, k: int, gated: bool) -> None:
    plan = tiled_plan(m, n, k, SMS, CLUSTERS_OF_4, gated)
    unit = 64 if plan.swapped else 16 if gated else 8
    wide, high, _ = plan.grid(m, n)
    assert plan.columns % unit == 0
    assert plan.columns <= 192
    assert wide // plan.split * plan.columns >= n
    assert m <= high * plan.x_rows(m)
    assert plan.x_rows(m) <= plan.rows
    assert (high - 1) * plan.x_rows(m) < m, "no tile without a row"
    assert plan.stages >= 3
    # Sums meet where the ring was, whole units of columns at a time.
    assert plan.columns % plan.chunk == 0
    assert plan.chunk % unit == 0
    assert 4 * plan.rows * (plan.chunk + 4) <= plan.shared_bytes
    # All at once, as long as a block's share of W fits its sums.
    assert plan.blocks_per_sm * (plan.shared_bytes + 1024) <= 228 * 1024
    if n <= 192 * SMS // high:
        assert wide * high <= SMS
    if plan.split == 4 and plan.blocks_per_sm == 1:
        assert wide * high // 4 <= CLUSTERS_OF_4


def test_sides_are_swapped_where_that_moves_less_through_shared_memory() -> None:
    assert tiled_plan(144, 6144, 4096, SMS, CLUSTERS_OF_4) == Tiled(144, 64, 1, 1, swapped=True)
    assert tiled_plan(144, 4096, 12288, SMS, CLUSTERS_OF_4) == Tiled(144, 64, 2, 1, swapped=True)
    assert tiled_plan(210, 24576, 4096, SMS, CLUSTERS_OF_4, gated=True).swapped
    assert not tiled_plan(256, 24576, 4096, SMS, CLUSTERS_OF_4, gated=True).swapped
    assert not tiled_plan(64, 6144, 4096, SMS, CLUSTERS_OF_4).swapped
    assert Tiled(144, 64, 2, 1, swapped=True).cycles(144) == (16 + 144 / 4 + (144 + 64) / 4) / 2


def test_small_weights_start_beside_the_kernel_before_them() -> None:
    """Two blocks a multiprocessor, unless k is long: with more than 64 rows, where k is divided."""

    def plan(m: int, n: int, k: int) -> Tiled:
        return tiled_plan(m, n, k, SMS, CLUSTERS_OF_4)

    assert plan(64, 4096, 1024) == Tiled(64, 32, 1, 2)
    assert plan(65, 4096, 1024).blocks_per_sm == 1
    assert plan(64, 1024, 2048) == Tiled(64, 32, 4, 2)
    assert plan(128, 1024, 2048) == Tiled(128, 32, 4, 2)
    assert plan(129, 1024, 2048).blocks_per_sm == 1
    assert plan(64, 1024, 3072) == Tiled(64, 40, 4, 1)
    assert plan(64, 6144, 2560).blocks_per_sm == 1


def test_a_head_is_taken_tile_after_tile() -> None:
    def plan(m: int, n: int, k: int) -> Tiled:
        return tiled_plan(m, n, k, SMS, CLUSTERS_OF_4)

    assert plan(64, 151936, 1024) == Tiled(64, 128, 1, 2)
    assert plan(64, 151936, 4096) == Tiled(64, 128, 1, 1)
    assert plan(65, 151936, 1024) == Tiled(128, 192, 1, 1)
    assert plan(65, 151936, 4096) == Tiled(128, 128, 1, 1)
    assert plan(64, 50257, 4096) == Tiled(64, 64, 1, 1), "few rounds of wide tiles end unevenly"


def test_heads_end_a_qkv_product_where_there_is_a_block_for_each() -> None:
    assert qkv_plan(64, 4096, 1024, SMS) == Tiled(64, 128, 2, 1)
    assert qkv_plan(64, 6144, 4096, SMS) == Tiled(64, 128, 2, 1)
    assert qkv_plan(256, 4096, 1024, SMS) == Tiled(64, 128, 1, 1)
    assert qkv_plan(65, 6144, 4096, SMS) is None, "half of the multiprocessors would have no block"
    assert qkv_plan(64, 8192 + 2048, 5120, SMS) is None


def test_fewer_stages_where_shared_memory_is_small() -> None:
    plan = Skinny(2, 1, 1, 8, 1, 5)
    small = plan.fit(99 * 1024)
    assert small.shared_bytes(norm=True) <= 99 * 1024 < plan.shared_bytes(norm=True)
    assert small.stages == 4


def test_cublas_keeps_what_it_does_better() -> None:
    assert faster_than_cublas(1, 151936, 4096, SMS, hopper=False)
    assert faster_than_cublas(64, 24576, 4096, SMS, hopper=True)
    assert not faster_than_cublas(17, 1024, 2048, SMS, hopper=False)
    assert faster_than_cublas(256, 1024, 2048, SMS, hopper=True)
    assert faster_than_cublas(128, 151936, 4096, SMS, hopper=True)
    assert not faster_than_cublas(129, 151936, 4096, SMS, hopper=True)
    assert not faster_than_cublas(257, 24576, 4096, SMS, hopper=True)


@pytest.fixture(scope="module")
def products() -> SkinnyLinear:
    return SkinnyLinear(KernelLibrary())


def _skip_if_too_tall(products: SkinnyLinear, m: int) -> None:
    if m > products.max_rows:
        pytest.skip(f"takes {products.max_rows} rows on this GPU")


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def _error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out.double() - expected).norm() / expected.norm()).item()


def _silu_mul(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def _expect_norm_left(scaled: ScaledRows, h: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
    """rms_norm(h, gains, 1e-5) in float64, of what was left for it beside the residual h."""
    assert torch.equal(scaled.rows, h * gains)
    squares = scaled.squares.double().sum(0)
    assert torch.allclose(squares, h.double().square().sum(1), rtol=1e-5)
    return h.double() * torch.rsqrt(squares[:, None] / h.shape[1] + 1e-5) * gains.double()


def _poisoned(m: int, n: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.full((m, n), float("nan"), dtype=dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "k"),
    [
        *((1, 8), (7, 24), (133, 40), (1024, 2048), (1000, 1032), (2560, 9728), (6151, 2568)),
        pytest.param(25601, 2056, id="head"),
    ],
)
@pytest.mark.parametrize("m", [1, 3, 8, 9, 16, 17, 31, 64, 77, 128, 150, 192, 193, 201, 256])
def test_equals_float64(products: SkinnyLinear, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    _skip_if_too_tall(products, m)
    x, weight = _random(m, k, dtype=dtype), _random(n, k, dtype=dtype, scale=k**-0.5)
    out = products.linear(x, weight, _poisoned(m, n, dtype))
    expected = x.double() @ weight.double().t()
    assert _error(out, expected) < (4e-3 if dtype == torch.bfloat16 else 5e-4)
    assert torch.equal(out, products.linear(x, weight)), "same input, other bits"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "k"),
    [
        pytest.param(32, 72, id="small"),
        pytest.param(272, 2056, id="small-split-over-k"),
        (2048, 1024),
        (2064, 4104),
        (12304, 2056),
    ],
)
@pytest.mark.parametrize("m", [1, 6, 8, 11, 16, 29, 64, 90, 128, 170, 200, 256])
def test_fused_parts_equal_their_separate_float64(
    products: SkinnyLinear, m: int, n: int, k: int
) -> None:
    _skip_if_too_tall(products, m)
    x, weight = _random(m, k, scale=3.0), _random(n, k, scale=k**-0.5)
    norm = 1 + _random(k, scale=0.3)
    y = x.double() * torch.rsqrt(x.double().square().mean(1, keepdim=True) + 1e-5)
    y = (y * norm.double()) @ weight.double().t()

    plain, residual = x.double() @ weight.double().t(), _random(m, n)
    if m <= products.MAX_NORM_ROWS:
        out = products.linear(x, weight, _poisoned(m, n), norm=norm, eps=1e-5, residual=residual)
        assert _error(out, y + residual.double()) < 6e-3
        out = products.linear(x, weight, _poisoned(m, n // 2), norm=norm, eps=1e-5, gated=True)
        assert _error(out, _silu_mul(y)) < 9e-3

    out = products.linear(x, weight, _poisoned(m, n // 2), gated=True)
    assert _error(out, _silu_mul(plain)) < 9e-3
    stream = residual.clone()
    products.linear(x, weight, stream, residual=stream)
    assert _error(stream, plain + residual.double()) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "k", "inner"),
    [
        pytest.param(96, 72, 64, id="small"),
        pytest.param(272, 2056, 96, id="small-split-over-k"),
        (1024, 2048, 6144),
        (2560, 4096, 9728),
        (4096, 12288, 6144),
    ],
)
@pytest.mark.parametrize("m", [1, 3, 8, 9, 16, 29, 64, 90, 128, 170, 200, 256])
def test_a_residual_leaves_what_the_next_norm_needs(
    products: SkinnyLinear, m: int, n: int, k: int, inner: int
) -> None:
    if not products.supports_scaled(m, n, k, torch.bfloat16):
        pytest.skip("norms are kernels of their own here")
    x, weight = _random(m, k), _random(n, k, scale=k**-0.5)
    gains, after = 1 + _random(n, scale=0.3), _random(inner, n, scale=n**-0.5)
    before = _random(m, n, scale=3.0)
    h = before.clone()
    scaled = products.add_linear_scaled(h, x, weight, gains)
    assert torch.equal(h, products.linear(x, weight, residual=before))
    expected = _expect_norm_left(scaled, h, gains) @ after.double().t()
    assert _error(products.linear_of_scaled(scaled, after, eps=1e-5), expected) < 6e-3
    gated = products.linear_of_scaled(scaled, after, eps=1e-5, gated=True)
    assert _error(gated, _silu_mul(expected)) < 9e-3


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "kv_heads", "k"),
    [pytest.param(2, 1, 136, id="small"), (16, 8, 1024), (32, 8, 2560), (32, 8, 4096)],
)
@pytest.mark.parametrize(
    ("cache", "normed"), [(torch.bfloat16, True), (torch.float8_e4m3fn, False)]
)
@pytest.mark.parametrize("m", [9, 16, 29, 64, 90, 128, 170, 256])
def test_a_qkv_product_ends_as_heads_in_the_cache(
    products: SkinnyLinear,
    m: int,
    heads: int,
    kv_heads: int,
    k: int,
    cache: torch.dtype,
    normed: bool,
) -> None:
    rope, layers = rope_case(m, heads, kv_heads, 128, torch.bfloat16, cache, normed=normed)
    if not products.supports_qkv(m, rope.width, k, 128, torch.bfloat16):
        pytest.skip("two kernels here")
    weight = _random(rope.width, k, scale=0.05)
    h, gains = _random(m, k, scale=3.0), 1 + _random(k, scale=0.3)
    scaled = ScaledRows(h * gains, h.float().square().sum(1)[None])
    y = _expect_norm_left(scaled, h, gains) @ weight.double().t()
    q = products.qkv_of_scaled(scaled, weight, rope, eps=1e-5)
    expect_rotated(rope, layers, y, q)

    graph, again = torch.cuda.CUDAGraph(), layers.clone()
    with torch.cuda.graph(graph):
        for _ in range(3):
            in_graph = products.qkv_of_scaled(scaled, weight, rope, eps=1e-5, early=True)
    layers.zero_()
    graph.replay()
    assert torch.equal(in_graph, q)
    assert torch.equal(layers.view(torch.uint8), again.view(torch.uint8))


@pytest.mark.gpu
def test_a_qkv_product_of_other_heads_is_refused(products: SkinnyLinear) -> None:
    _skip_if_too_tall(products, 64)
    weight, gains = _random(512, 64), _random(64)
    h = _random(9, 64)
    scaled = ScaledRows(h * gains, h.float().square().sum(1)[None])
    for heads, head_dim in ((3, 128), (6, 64)):
        rope, _ = rope_case(9, heads, 1, head_dim, torch.bfloat16, torch.bfloat16, normed=False)
        assert not products.supports_qkv(9, 512, 64, 64, torch.bfloat16)
        with pytest.raises(KernelError, match=f"{rope.width} of all heads"):
            products.qkv_of_scaled(scaled, weight, rope, eps=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [70, 150, 209])
@pytest.mark.parametrize(
    ("columns", "split"),
    [
        pytest.param(64, 1, id="small-64"),
        pytest.param(64, 2, id="small-64-split-over-k"),
        pytest.param(128, 2, id="small-128-split-over-k"),
        pytest.param(192, 1, id="small-192"),
    ],
)
def test_sides_may_be_swapped(
    products: SkinnyLinear, m: int, columns: int, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _skip_if_too_tall(products, m)
    plan = Tiled(-(-m // 16) * 16, columns, split, 1, swapped=True)
    monkeypatch.setattr("zllm.cuda.linear.tiled_plan", lambda *_: plan)
    n, k = 272, 392
    x, weight, residual = _random(m, k), _random(n, k, scale=k**-0.5), _random(m, n, scale=3.0)
    y = x.double() @ weight.double().t()
    assert _error(products.linear(x, weight, _poisoned(m, n)), y) < 4e-3
    odd = products.linear(x, weight[:133], _poisoned(m, 133))
    assert _error(odd, y[:, :133]) < 4e-3
    gated = products.linear(x, weight, _poisoned(m, n // 2), gated=True)
    assert _error(gated, _silu_mul(y)) < 9e-3

    h, gains = residual.clone(), 1 + _random(n, scale=0.3)
    scaled = products.add_linear_scaled(h, x, weight, gains)
    assert _error(h, y + residual.double()) < 4e-3
    after = _random(96, n, scale=n**-0.5)
    expected = _expect_norm_left(scaled, h, gains) @ after.double().t()
    assert _error(products.linear_of_scaled(scaled, after, eps=1e-5), expected) < 6e-3


@pytest.mark.gpu
@pytest.mark.parametrize("m", [4, 12, 64, 112, 144, 160, 208, 224])
@pytest.mark.parametrize("size", [1024, 2560, 4096])
def test_a_chain_in_a_graph_sees_each_product_before_it(
    products: SkinnyLinear, m: int, size: int
) -> None:
    _skip_if_too_tall(products, m)
    weights = [_random(size, size, scale=size**-0.5) for _ in range(12)]
    x = _random(m, size)

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
        ({"x": (257, 64)}, "x: 257 rows"),
        ({"x": (2, 60), "weight": (32, 60)}, "x: 60 columns"),
        ({"weight": (32, 72)}, "weight: shape"),
        ({"out": (2, 31)}, "out: shape"),
        ({"residual": (1, 32)}, "residual: shape"),
        ({"norm": (32,)}, "norm: shape"),
        ({"x": (9, 64), "norm": (64,)}, "norm: fused for 8 rows"),
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
def test_a_residual_that_cannot_leave_its_norm_is_refused(products: SkinnyLinear) -> None:
    x, weight, gains = _random(4, 64), _random(32, 64), _random(32)
    with pytest.raises(KernelError, match="not as supports_scaled says"):
        products.add_linear_scaled(_random(4, 32), x, weight, gains)


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
def test_supports_only_what_it_computes(products: SkinnyLinear) -> None:
    assert products.supports(1, 151936, 4096, torch.bfloat16)
    assert products.supports(16, 1024, 2048, torch.float16)
    assert not products.supports(products.max_rows + 1, 1024, 2048, torch.bfloat16)
    assert not products.supports(1, 1024, 2048, torch.float32)
    assert not products.supports(1, 1024, 2044, torch.bfloat16)
    assert not products.supports_scaled(products.max_rows + 1, 4096, 4096, torch.bfloat16)
