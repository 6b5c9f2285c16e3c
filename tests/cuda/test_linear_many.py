"""Products with many rows, and what follows them, against float64, and their boundaries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda.accuracy import TOLERANCE, poisoned, relative_error
from tests.cuda.rotation import FP8, expect_rotated, rope_case
from zllm.cuda import linear_many
from zllm.cuda.compiler import Compiler, Program
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.linear_many import NARROW, WIDE, ManyRows, NormsAhead, Tile, programs
from zllm.errors import KernelError

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(("dtype", "cache"), [(BF16, BF16), (BF16, FP8), (FP16, FP16)])
def test_hopper_compiles_them(dtype: torch.dtype, cache: torch.dtype, tmp_path: Path) -> None:
    found = list(programs(dtype, cache, 16, 8, 128, qk_norm=True, norm=dtype == BF16))
    sources = ["linear_gated.cu"] * 2 + ["linear_qkv.cu"] * 2
    assert [program.source for program in found] == sources
    for which in found:
        cubin = Compiler("sm_90a", tmp_path).compile(which.source, which.defines)
        assert cubin.startswith(b"\x7fELF")


def test_other_heads_are_rotated_behind_the_product() -> None:
    found = programs(BF16, BF16, 14, 2, 64, qk_norm=True, norm=True)
    assert {program.source for program in found} == {"linear_gated.cu"}


def test_what_is_computed_in_vain_counts() -> None:
    assert WIDE.useful_share(8192, 256 * 33, clusters=66) == 1.0
    assert WIDE.useful_share(8192 - 128, 256 * 33, clusters=66) == 1.0 - 1 / 64
    assert WIDE.useful_share(256, 256, clusters=66) == 1 / 66
    a_round_more = (256 * 33 + 128) / (256 * 33) * 16 / 17
    assert WIDE.useful_share(8192, 256 * 33 + 128, clusters=66) == pytest.approx(a_round_more)
    assert NARROW.useful_share(8192, 192 * 33, clusters=66) == 192 / 208, "its tiles cost more"


@pytest.mark.parametrize("tile", [WIDE, NARROW])
def test_a_tile_fits_a_multiprocessor(tile: Tile) -> None:
    assert 200 * 1024 < tile.shared_bytes <= 227 * 1024


@pytest.fixture(scope="module")
def products(kernels: KernelLibrary) -> ManyRows:
    if not kernels.hopper:
        pytest.skip("these products are for Hopper")
    return ManyRows(kernels)


def _random(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def _silu_mul(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = (x.double() @ weight.double().t()).chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("m", "inter", "k"),
    [
        pytest.param(300, 104, 136, id="small"),  # the second block of a cluster has few rows
        (8, 512, 64),  # one step of k, most rows outside
        (1061, 1024, 3072),
        (8192, 2560, 1024),  # several tiles for each thread block
        (777, 4136, 4096),  # the last tile is not full
    ],
)
@pytest.mark.parametrize("tile", [WIDE, NARROW])
def test_gated(
    products: ManyRows,
    monkeypatch: pytest.MonkeyPatch,
    tile: Tile,
    dtype: torch.dtype,
    m: int,
    inter: int,
    k: int,
) -> None:
    monkeypatch.setattr(products, "_tile", lambda m, n: tile)
    x, weight = _random(m, k, dtype=dtype), _random(2 * inter, k, dtype=dtype, scale=0.05)
    out = products.gated(x, weight, poisoned(m, inter, dtype=dtype))
    assert relative_error(out, _silu_mul(x, weight)) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "heads", "kv_heads", "k", "dtype", "cache", "normed"),
    [
        pytest.param(300, 2, 1, 136, BF16, BF16, True, id="small"),
        (5, 4, 2, 64, BF16, BF16, False),  # one step of k, most rows outside
        (640, 3, 1, 512, BF16, BF16, True),  # queries and keys share a tile, the last is half full
        (777, 14, 2, 896, BF16, FP8, True),
        (1061, 16, 8, 1024, FP16, FP16, True),
        (8192, 16, 8, 1024, BF16, BF16, True),  # several tiles for each thread block
        (4100, 32, 8, 4096, BF16, FP8, False),
        (1061, 0, 8, 1024, BF16, BF16, True),  # keys and values alone
        (300, 0, 1, 136, BF16, FP8, False),
    ],
)
def test_qkv(
    products: ManyRows,
    m: int,
    heads: int,
    kv_heads: int,
    k: int,
    dtype: torch.dtype,
    cache: torch.dtype,
    normed: bool,
) -> None:
    rope, layers = rope_case(m, heads, kv_heads, 128, dtype, cache, normed=normed)
    x, weight = _random(m, k, dtype=dtype), _random(rope.width, k, dtype=dtype, scale=0.05)
    q = products.qkv(x, weight, rope, poisoned(m, heads, 128, dtype=dtype))
    expect_rotated(rope, layers, x.double() @ weight.double().t(), q)


EPS = 1e-5


def _normalized(x: Tensor) -> Tensor:
    x = x.double()
    return x * (x.square().mean(1, keepdim=True) + EPS).rsqrt()


def _uneven(m: int, k: int) -> Tensor:
    """Rows from a thousandth to a thousand times as long as others, one of zeros."""
    x = _random(m, k) * torch.logspace(-3, 3, m, device="cuda")[torch.randperm(m), None]
    x[m // 2] = 0
    return x.to(BF16)


def _ahead(norms: int, rows: int) -> NormsAhead:
    return NormsAhead.of(norms, rows, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "inter", "k"),
    [
        pytest.param(300, 104, 136, id="small"),
        (8, 512, 64),  # fewer rows than warps that scale them
        (1061, 1024, 3072),
        (8192, 2560, 1024),  # four bands of rows
        (777, 4136, 4096),
        (6000, 256, 8192),  # more bands than tiles for each thread block
    ],
)
@pytest.mark.parametrize("tile", [WIDE, NARROW])
def test_gated_of_normalized_rows(
    products: ManyRows, monkeypatch: pytest.MonkeyPatch, tile: Tile, m: int, inter: int, k: int
) -> None:
    monkeypatch.setattr(products, "_tile", lambda m, n: tile)
    x, weight = _uneven(m, k), _random(2 * inter, k, scale=0.05)
    out = products.gated(x, weight, poisoned(m, inter, dtype=BF16), norm=_ahead(1, m), eps=EPS)
    expected = _silu_mul(_normalized(x), weight)
    assert relative_error(out, expected) < TOLERANCE[BF16]
    assert not out[m // 2].any()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "heads", "kv_heads", "k", "cache", "normed"),
    [
        pytest.param(300, 2, 1, 136, BF16, True, id="small"),
        (5, 4, 2, 64, BF16, False),
        (777, 14, 2, 896, FP8, True),
        (8192, 16, 8, 1024, BF16, True),
        (4100, 32, 8, 4096, FP8, False),
        (8192, 0, 8, 4096, BF16, True),  # keys and values alone
    ],
)
def test_qkv_of_normalized_rows(
    products: ManyRows,
    m: int,
    heads: int,
    kv_heads: int,
    k: int,
    cache: torch.dtype,
    normed: bool,
) -> None:
    rope, layers = rope_case(m, heads, kv_heads, 128, BF16, cache, normed=normed)
    rope = replace(rope, eps=EPS)
    x, weight = _uneven(m, k), _random(rope.width, k, scale=0.05)
    out = poisoned(m, heads, 128, dtype=BF16)
    q = products.qkv(x, weight, rope, out, norm=_ahead(1, m))
    expect_rotated(rope, layers, _normalized(x) @ weight.double().t(), q)


@pytest.mark.gpu
def test_a_norm_serves_one_product_and_gives_way_to_the_next(products: ManyRows) -> None:
    x, weight = _uneven(512, 256), _random(512, 256, scale=0.05)
    ahead = _ahead(2, 512)
    outs = []
    for _ in range(2):
        outs.append(products.gated(x, weight, norm=ahead, eps=EPS))
        ahead = ahead.behind()
    assert torch.equal(*outs)
    with pytest.raises(KernelError, match=r"norm: 0 left of torch\.bfloat16"):
        products.gated(x, weight, norm=ahead, eps=EPS)
    with pytest.raises(KernelError, match=r"norm: 1 left of torch\.float16"):
        products.gated(x.half(), weight.half(), norm=_ahead(1, 512), eps=EPS)


@pytest.mark.gpu
def test_a_thread_block_that_waits_in_vain_helps_itself(
    products: ManyRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here after one look, where usually it is some 10 ms."""
    x, weight = _uneven(5000, 1024), _random(6144, 1024, scale=0.05)
    patient = products.gated(x, weight, norm=_ahead(1, 5000), eps=EPS)
    plain = linear_many.gated_program

    def impatient(dtype: torch.dtype, tile: Tile, norm: bool) -> Program:
        which = plain(dtype, tile, norm)
        return Program(which.source, {**which.defines, "PATIENCE": 1})

    monkeypatch.setattr(linear_many, "gated_program", impatient)
    assert torch.equal(products.gated(x, weight, norm=_ahead(1, 5000), eps=EPS), patient)


@pytest.mark.gpu
def test_rows_that_are_not_finite_end_too(products: ManyRows) -> None:
    """A scale of 0 is one that is not there yet: none may ever be."""
    x, weight = _random(512, 256), _random(512, 256, scale=0.05)
    x[3], x[5], x[7] = 3e38, float("inf"), float("nan")
    out = products.gated(x, weight, norm=_ahead(1, 512), eps=EPS)
    finite = out.isfinite().all(dim=1)
    assert not finite[[5, 7]].any()
    others = [row for row in range(512) if row not in (3, 5, 7)]
    assert relative_error(out[others], _silu_mul(_normalized(x[others]), weight)) < TOLERANCE[BF16]


@pytest.mark.gpu
def test_the_same_bits_each_time_and_in_a_graph(products: ManyRows) -> None:
    x, weight = _random(4096, 1024), _random(6144, 1024)
    rope, layers = rope_case(4096, 32, 8, 128, BF16, BF16, normed=True)

    def run() -> tuple[Tensor, ...]:
        ahead = _ahead(2, len(x))
        gated = products.gated(x, weight, norm=ahead, eps=EPS)
        q = products.qkv(x, weight, rope, norm=ahead.behind())
        return gated, q, layers.clone()

    def expect_first(results: tuple[Tensor, ...]) -> None:
        for result, wanted in zip(results, first, strict=True):
            assert torch.equal(result, wanted)

    first = run()
    for _ in range(10):
        expect_first(run())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            in_graph = run()
    layers.zero_()
    graph.replay()
    expect_first(in_graph)
    # Of other rows, the scales are others: none may be left of those before.
    x.copy_(_uneven(*x.shape))
    graph.replay()
    for result, wanted in zip(in_graph, run(), strict=True):
        assert torch.equal(result, wanted)


@pytest.mark.gpu
def test_few_rows_and_float32_are_left_to_others(products: ManyRows) -> None:
    assert products.supports_gated(8192, 24576, 4096, BF16)
    assert not products.supports_gated(256, 24576, 4096, BF16)
    assert not products.supports_gated(8192, 24576, 4096, torch.float32)
    assert products.supports_qkv(8192, 6144, 4096, 128, BF16)
    assert not products.supports_qkv(8192, 6144, 4096, 64, BF16)
    assert products.supports_qkv(2048, 6144, 1024, 128, BF16)
    assert not products.supports_qkv(2048, 4096, 1024, 128, BF16), "two rounds of tiles"


@pytest.mark.gpu
def test_boundaries_name_the_argument(products: ManyRows) -> None:
    x, weight = _random(512, 256), _random(512, 256)
    with pytest.raises(KernelError, match=r"weight has shape \[512, 128\]"):
        products.gated(x, weight[:, :128].contiguous())
    with pytest.raises(KernelError, match="weight has 376 rows"):
        products.gated(x, weight[:376].contiguous())
    with pytest.raises(KernelError, match=r"out has shape \[512, 128\]"):
        products.gated(x, weight, x[:, :128].contiguous())
    with pytest.raises(KernelError, match=r"x is torch\.float32"):
        products.gated(x.float(), weight)
    rope, _ = rope_case(512, 2, 1, 128, BF16, BF16, normed=False)
    with pytest.raises(KernelError, match="weight has 384 rows: the heads need 512"):
        products.qkv(x, weight[:384].contiguous(), rope)
    with pytest.raises(KernelError, match="slots has shape"):
        products.qkv(x, weight, replace(rope, slots=rope.slots[:-1]))
    narrow, _ = rope_case(512, 2, 1, 64, BF16, BF16, normed=False)
    with pytest.raises(KernelError, match="heads of 64: they must be of 128"):
        products.qkv(x, weight[:256].contiguous(), narrow)
