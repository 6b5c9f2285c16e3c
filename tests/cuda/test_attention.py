"""Paged attention against dense attention in float64, over random ragged batches."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from zllm.cuda.attention import AttentionSpec, AttentionWork, PagedAttention
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.rope_cache import RopeCache, rope_cache
from zllm.errors import KernelError

pytestmark = pytest.mark.gpu

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
# Error of the whole output relative to its norm: a few roundings to the dtype.
TOLERANCE = {BF16: 6e-3, FP16: 1e-3, FP32: 2e-6}
MIXED = [(1, 0), (1, 15), (1, 16), (1, 1000), (1, 4099), (2, 0), (17, 0), (130, 333), (64, 64),
         (300, 0), (5, 2047)]  # fmt: skip
"""Rows as (query tokens, tokens in the cache)."""


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    return KernelLibrary()


def permuted(run: Tensor) -> Tensor:
    """[..., 16, D] in the order of kv_layout.cuh, which this states a second time."""
    row_bytes = run.shape[-1] * run.element_size()
    order = []
    for column in range(0, row_bytes, 128):
        chunks = min(128, row_bytes - column) // 16
        for row in range(16):
            key = row % 8 if chunks == 8 else row // 2 % 4
            order += [row * (row_bytes // 16) + column // 16 + (c ^ key) for c in range(chunks)]
    flat = run.contiguous().view(torch.uint8).view(*run.shape[:-2], 16 * row_bytes // 16, 16)
    return flat[..., order, :].reshape(*run.shape[:-1], row_bytes).view(run.dtype)


@dataclass
class Case:
    """A step with its cache, and what attention must give."""

    spec: AttentionSpec
    q: Tensor
    keys: Tensor
    values: Tensor
    table: Tensor
    rows: Tensor
    q_start: Tensor
    kv_len: Tensor
    scales: tuple[Tensor, Tensor]
    expected: Tensor
    tokens: int
    decode_only: bool

    def plan(self, attention: PagedAttention) -> AttentionWork:
        return attention.plan(
            self.rows,
            self.q_start,
            self.kv_len,
            num_tokens=self.q.shape[0],
            decode_only=self.decode_only,
        )

    def run(self, attention: PagedAttention, work: AttentionWork) -> Tensor:
        out = torch.full((self.q.shape[0], self.expected.shape[1]), torch.nan, dtype=self.q.dtype)
        return attention.run(
            self.q,
            self.keys,
            self.values,
            self.table,
            work,
            scale=self.spec.head_dim**-0.5,
            out=out.cuda(),
            k_scale=self.scales[0] if self.spec.fp8 else None,
            v_scale=self.scales[1] if self.spec.fp8 else None,
        )

    def check(self, out: Tensor) -> None:
        got, tolerance = out[: self.tokens].double(), TOLERANCE[self.spec.dtype]
        assert torch.isfinite(got).all()
        assert (got - self.expected).norm() <= tolerance * self.expected.norm()
        by_token = (got - self.expected).norm(dim=1) / self.expected.norm(dim=1)
        assert by_token.max() <= 4 * tolerance, f"token {by_token.argmax()}"


def make_case(
    shape: list[tuple[int, int]],
    *,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 128,
    dtype: torch.dtype = BF16,
    kv_dtype: torch.dtype | None = None,
    padding_rows: int = 3,
    padding_tokens: int = 5,
    seed: int = 0,
) -> Case:
    """Sequences in random blocks of a cache that is NaN wherever no token stands."""
    spec = AttentionSpec(heads, kv_heads, head_dim, dtype, kv_dtype or dtype)
    chance, generator = random.Random(seed), torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cuda", dtype=torch.float32)

    blocks = [-(-(queries + cached) // 16) for queries, cached in shape]
    pool = list(range(1, sum(blocks) + 8))
    chance.shuffle(pool)
    device_rows = chance.sample(range(len(shape) + 4), len(shape))
    table = torch.zeros(len(shape) + 5, max(blocks) + 1, dtype=torch.int32)
    # Keys and values of two layers between each other, so that a stride is needed.
    cache = torch.full((len(pool) + 1, 2, 2, kv_heads, 16, head_dim), torch.nan, device="cuda")
    cache = cache.to(spec.kv_dtype)
    tokens = sum(queries for queries, _ in shape)
    q = normal(tokens + padding_tokens, heads, head_dim).mul_(2).to(dtype)
    scales = torch.tensor([0.5], device="cuda"), torch.tensor([0.25], device="cuda")
    expected, q_start = [], [0]
    for (queries, cached), row, count in zip(shape, device_rows, blocks, strict=True):
        mine = [pool.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(mine)
        length = queries + cached
        dense = []
        for which in range(2):
            x = normal(count * 16, kv_heads, head_dim).to(spec.kv_dtype)
            plain = x.double() * (scales[which].item() if spec.fp8 else 1.0)
            dense.append(plain[:length].repeat_interleave(spec.group, 1))
            bits = x.view(torch.uint8).view(count * 16, kv_heads, -1)
            bits[length:] = 0xFF  # NaN in each of the dtypes
            runs = bits.view(spec.kv_dtype).view(count, 16, kv_heads, head_dim).transpose(1, 2)
            cache[mine, 1, which] = permuted(runs)
        mask = torch.ones(queries, length, device="cuda").tril(cached) > 0
        part = q[q_start[-1] : q_start[-1] + queries].double()
        scores = torch.einsum("qhd,khd->hqk", part, dense[0]) * head_dim**-0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        expected.append(torch.einsum("hqk,khd->qhd", weights, dense[1]).flatten(1))
        q_start.append(q_start[-1] + queries)

    def ints(*parts: list[int]) -> Tensor:
        return torch.tensor([x for part in parts for x in part], dtype=torch.int32, device="cuda")

    return Case(
        spec,
        q,
        cache[:, 1, 0],
        cache[:, 1, 1],
        table.cuda(),
        ints(device_rows, [len(shape) + 4] * padding_rows),
        ints(q_start, [tokens] * padding_rows),
        ints([cached for _, cached in shape], [0] * padding_rows),
        scales,
        torch.cat(expected),
        tokens,
        all(queries == 1 for queries, _ in shape),
    )


def attention_for(library: KernelLibrary, case: Case, portable: bool = False) -> PagedAttention:
    return PagedAttention(
        library,
        case.spec,
        max_rows=case.rows.numel(),
        max_tokens=case.q.shape[0],
        portable=portable,
    )


@pytest.mark.parametrize(
    ("head_dim", "dtype", "kv_dtype", "portable"),
    [
        (128, BF16, BF16, False),
        (128, BF16, BF16, True),
        (128, BF16, FP8, False),
        (64, FP16, FP8, True),
        (96, FP16, FP16, False),
        (64, FP32, FP32, False),
    ],
)
def test_every_kernel_small(
    library: KernelLibrary,
    head_dim: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    portable: bool,
) -> None:
    shape = [(1, 0), (1, 17), (1, 300), (40, 3), (20, 3000)]  # the last is cut along its keys
    case = make_case(shape, heads=4, kv_heads=1, head_dim=head_dim, dtype=dtype, kv_dtype=kv_dtype)
    attention = attention_for(library, case, portable)
    case.check(case.run(attention, case.plan(attention)))


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8, 16])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_mixed_batch(
    library: KernelLibrary, dtype: torch.dtype, group: int, portable: bool
) -> None:
    case = make_case(MIXED, heads=2 * group, dtype=dtype, seed=group)
    attention = attention_for(library, case, portable)
    case.check(case.run(attention, case.plan(attention)))


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_head_sizes(library: KernelLibrary, head_dim: int, portable: bool) -> None:
    case = make_case(MIXED, head_dim=head_dim, seed=head_dim)
    attention = attention_for(library, case, portable)
    case.check(case.run(attention, case.plan(attention)))


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_float8_cache(
    library: KernelLibrary, dtype: torch.dtype, head_dim: int, portable: bool
) -> None:
    case = make_case(MIXED, head_dim=head_dim, dtype=dtype, kv_dtype=FP8)
    attention = attention_for(library, case, portable)
    case.check(case.run(attention, case.plan(attention)))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_float32(library: KernelLibrary, head_dim: int) -> None:
    case = make_case(MIXED, head_dim=head_dim, dtype=FP32)
    attention = attention_for(library, case)
    case.check(case.run(attention, case.plan(attention)))


@pytest.mark.parametrize("seed", range(6))
def test_random_ragged_batches(library: KernelLibrary, seed: int) -> None:
    chance = random.Random(seed)
    decodes = [(1, chance.choice([chance.randrange(40), chance.randrange(3000)]))
               for _ in range(chance.randrange(60))]  # fmt: skip
    chunks = [(chance.randrange(1, 400), chance.choice([0, chance.randrange(900)]))
              for _ in range(chance.randrange(1, 8))]  # fmt: skip
    kv_heads = chance.choice([1, 3, 8])
    case = make_case(decodes + chunks, heads=kv_heads * 4, kv_heads=kv_heads, seed=seed)
    attention = attention_for(library, case)
    case.check(case.run(attention, case.plan(attention)))


def test_decodes_alone_need_no_prefill_kernel(library: KernelLibrary) -> None:
    case = make_case([(1, 777), (1, 0), (1, 5000), (1, 31)])
    assert case.decode_only
    attention = attention_for(library, case)
    work = case.plan(attention)
    assert work.max_tiles == 0
    case.check(case.run(attention, work))


@pytest.mark.parametrize(
    ("head_dim", "kv_dtype"),
    [*((size, BF16) for size in (64, 96, 128, 256)), *((size, FP8) for size in (64, 128, 256))],
)
def test_last_blocks_of_any_length(
    library: KernelLibrary, head_dim: int, kv_dtype: torch.dtype
) -> None:
    # Of a block that is not full, no more need come than its tokens: behind them, shared memory
    # keeps what another step left there.
    other = make_case([(1, 2047)] * 64, head_dim=head_dim, kv_dtype=kv_dtype)
    for cache in (other.keys, other.values):
        cache.view(torch.uint8).fill_(0xFF)  # NaN in each of the dtypes
    case = make_case([(1, n) for n in range(80)], head_dim=head_dim, kv_dtype=kv_dtype)
    attention = attention_for(library, case)
    for _ in range(3):
        assert other.run(attention, other.plan(attention))[: other.tokens].isnan().all()
        case.check(case.run(attention, case.plan(attention)))


def test_one_long_sequence_beside_short_ones(library: KernelLibrary) -> None:
    case = make_case([(1, 100)] * 5 + [(1, 40_000)] + [(1, 7)] * 20, kv_heads=8, heads=32)
    attention = attention_for(library, case)
    case.check(case.run(attention, case.plan(attention)))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_short_chunks_behind_long_prefixes(library: KernelLibrary, head_dim: int) -> None:
    shape = [(1, 3000), (100, 9000), (2, 30_000), (33, 12_345), (200, 0)]
    case = make_case(shape, heads=4, kv_heads=1, head_dim=head_dim)
    attention = attention_for(library, case)
    first = case.run(attention, case.plan(attention))[: case.tokens]
    case.check(first)
    for _ in range(10):
        again = case.run(attention, case.plan(attention))[: case.tokens]
        assert torch.equal(first.view(torch.int16), again.view(torch.int16))


def test_more_rows_than_thread_blocks(library: KernelLibrary) -> None:
    chance = random.Random(1)
    case = make_case([(1, chance.randrange(200)) for _ in range(1100)], heads=2, kv_heads=1)
    attention = attention_for(library, case)
    case.check(case.run(attention, case.plan(attention)))


@pytest.mark.parametrize("kv_dtype", [BF16, FP8])
def test_shares_that_begin_anywhere_in_a_pair(
    library: KernelLibrary, kv_dtype: torch.dtype
) -> None:
    shape = [(1, length % 70) for length in range(150)]
    case = make_case(shape, heads=32, kv_heads=8, kv_dtype=kv_dtype)
    attention = attention_for(library, case)
    case.check(case.run(attention, case.plan(attention)))


def test_an_empty_step_touches_nothing(library: KernelLibrary) -> None:
    case = make_case([(1, 3)])
    attention = attention_for(library, case)
    case.q_start.zero_()
    assert torch.isnan(case.run(attention, case.plan(attention))).all()


def test_same_inputs_give_same_bits(library: KernelLibrary) -> None:
    case = make_case([(1, 9000), *MIXED], heads=32, kv_heads=8)
    attention = attention_for(library, case)
    first = case.run(attention, case.plan(attention))[: case.tokens]
    for _ in range(20):
        again = case.run(attention, case.plan(attention))[: case.tokens]
        assert torch.equal(first.view(torch.int16), again.view(torch.int16))


def test_one_graph_serves_batches_of_other_lengths(library: KernelLibrary) -> None:
    case = make_case(MIXED)
    attention = attention_for(library, case)
    case.run(attention, case.plan(attention))
    graph = torch.cuda.CUDAGraph()
    # The replayed batch: the first rows alone. The others become padding.
    kept = 8
    q_start, tokens = case.q_start.clone(), int(case.q_start[kept])
    out = torch.full_like(case.q.flatten(1), torch.nan)
    with torch.cuda.graph(graph):
        work = case.plan(attention)
        attention.run(case.q, case.keys, case.values, case.table, work,
                      scale=case.spec.head_dim**-0.5, out=out)  # fmt: skip
    graph.replay()
    case.check(out)
    case.q_start.copy_(q_start.clamp(max=tokens))
    out.fill_(torch.nan)
    graph.replay()
    assert torch.isnan(out[tokens:]).all()
    case.expected, case.tokens = case.expected[:tokens], tokens
    case.check(out)


def test_a_small_chain_in_a_graph_sees_the_newest_tokens(library: KernelLibrary) -> None:
    """Old keys may be read before the kernel that writes the new ones has ended; those may not."""
    case = make_case([(1, 3000), (1, 700), (1, 16), (1, 0)], padding_tokens=0)
    spec, attention = case.spec, attention_for(library, case)
    work = case.plan(attention)
    positions = case.kv_len[: case.tokens]
    rows = case.rows[: case.tokens].long()
    slots = case.table[rows, positions.long() // 16] * 16 + positions % 16
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    qkv = torch.randn(case.tokens, width, device="cuda").to(spec.dtype)
    cos_sin = torch.rand(4096, spec.head_dim, device="cuda")

    def chain() -> Tensor:
        rope = RopeCache(
            positions, slots, case.keys, case.values, cos_sin, num_heads=spec.num_heads
        )
        q = rope_cache(library, qkv, rope)
        return attention.run(q, case.keys, case.values, case.table, work, scale=spec.head_dim**-0.5)

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(20):
        qkv.normal_()
        graph.replay()
        in_graph = out.clone()
        torch.cuda.synchronize()
        assert torch.isfinite(in_graph).all()
        assert torch.equal(in_graph, chain()), "the new tokens stand in the cache by now"


def test_a_wrong_argument_is_named(library: KernelLibrary) -> None:
    case = make_case([(1, 3), (4, 4)])
    attention = attention_for(library, case)
    work = case.plan(attention)
    for name, value in (
        ("q", case.q.float()),
        ("q", case.q[:-1]),
        ("keys", case.keys.transpose(1, 2)),
        ("values", case.values[..., :64]),
        ("table", case.table.long()),
    ):
        wrong = Case(**{**case.__dict__, name: value})
        with pytest.raises(KernelError, match=name):
            wrong.run(attention, work)
    with pytest.raises(KernelError, match="kv_len"):
        attention.plan(case.rows, case.q_start, case.kv_len[:-1], num_tokens=case.q.shape[0])
    with pytest.raises(KernelError, match="num_tokens"):
        attention.plan(case.rows, case.q_start, case.kv_len, num_tokens=10**6)
