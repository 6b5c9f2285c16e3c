"""The resident decoder against the same layers in float64, and its boundaries."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda.accuracy import relative_error
from zllm.cuda.compiler import Compiler
from zllm.cuda.decoder import ResidentDecoder, ResidentLayer
from zllm.cuda.decoder_plan import DecoderPlan, DecoderShape, grid_of
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.rope_cache import permute_cache, unpermute_cache

gpu = pytest.mark.gpu
BF16 = torch.bfloat16
EPS = 1e-6
TOLERANCE = 1.5e-2
"""Of the relative error after two layers whose every intermediate is rounded to bfloat16."""

TINY = DecoderShape(64, 128, 4, 2, 64, True, 2)
SHAPES = {
    "tiny": TINY,
    "odd": DecoderShape(192, 320, 6, 2, 64, False, 2),
    "mha": DecoderShape(256, 576, 4, 4, 64, True, 2),
    "group8": DecoderShape(512, 1088, 8, 1, 128, True, 2),
    "0.6b": DecoderShape(1024, 3072, 16, 8, 128, True, 2),
    "4b": DecoderShape(2560, 9728, 32, 8, 128, True, 2),
    "8b": DecoderShape(4096, 12288, 32, 8, 128, False, 2),
}
HOPPER_LIMIT = 227 * 1024


@pytest.mark.parametrize(
    ("name", "rows"), [("tiny", 8), ("0.6b", 1), ("4b", 1), ("4b", 4), ("8b", 1)]
)
def test_hopper_compiles_it_within_its_shared_memory(name: str, rows: int, tmp_path: Path) -> None:
    plan = DecoderPlan(SHAPES[name], rows, grid_of(SHAPES[name], 132), HOPPER_LIMIT)
    assert plan.fits
    assert plan.shared_bytes <= HOPPER_LIMIT
    cubin = Compiler("sm_90a", tmp_path).compile("decoder.cu", plan.macros())
    assert cubin.startswith(b"\x7fELF")


@dataclass
class Case:
    """A step, the layers it goes through, and what must come out."""

    decoder: ResidentDecoder
    tokens: Tensor
    positions: Tensor
    slots: Tensor
    rows: Tensor
    q_start: Tensor
    kv_len: Tensor
    table: Tensor
    cache: Tensor
    expected: Tensor
    expected_kv: Tensor
    count: int
    head_dim: int

    def run(self) -> Tensor:
        return self.decoder.run(
            self.tokens,
            self.positions,
            self.slots,
            self.rows,
            self.q_start,
            self.kv_len,
            self.table,
            scale=self.head_dim**-0.5,
        )

    def new_kv(self) -> Tensor:
        """[rows, layers, 2, kv heads, D]: what the step's slots hold."""
        slots = self.slots[: self.count].long()
        plain = unpermute_cache(self.cache[slots // 16])
        return plain[torch.arange(self.count), :, :, :, slots % 16]

    def check(self) -> None:
        out = self.run()
        assert relative_error(out[: self.count], self.expected) < TOLERANCE
        assert relative_error(self.new_kv(), self.expected_kv) < TOLERANCE


def make_case(
    kernels: KernelLibrary,
    shape: DecoderShape,
    lengths: list[int],
    *,
    padding: int = 0,
    seed: int = 0,
) -> Case:
    """Sequences of `lengths` tokens, the step's own included, in random blocks of a cache that is
    NaN wherever no token stands."""
    layers = shape.num_layers
    generator = torch.Generator("cuda").manual_seed(seed)
    chance = random.Random(seed)
    hidden, inner, dim = shape.hidden_size, shape.intermediate_size, shape.head_dim
    kv_heads, count, longest = shape.num_kv_heads, len(lengths), max(lengths)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cuda")

    def weight(rows: int, columns: int) -> Tensor:
        return (normal(rows, columns) * columns**-0.5).to(BF16)

    def norm(size: int) -> Tensor:
        return (1 + 0.3 * normal(size)).to(BF16)

    blocks = [-(-length // 16) for length in lengths]
    pool = list(range(1, sum(blocks) + 8))
    chance.shuffle(pool)
    device_rows = chance.sample(range(count + 4), count)
    table = torch.zeros(count + 5, max(blocks) + 1, dtype=torch.int32)
    cache = torch.full(
        (len(pool) + 1, layers, 2, kv_heads, 16, dim), torch.nan, dtype=BF16, device="cuda"
    )
    old = []
    slots = []
    for length, row, needed in zip(lengths, device_rows, blocks, strict=True):
        mine = [pool.pop() for _ in range(needed)]
        table[row, :needed] = torch.tensor(mine)
        dense = normal(needed * 16, layers, 2, kv_heads, dim).to(BF16)
        old.append(dense[: length - 1].double())
        dense[length - 1 :] = torch.nan
        runs = dense.view(needed, 16, layers, 2, kv_heads, dim).permute(0, 2, 3, 4, 1, 5)
        cache[mine] = permute_cache(runs)
        slots.append(mine[-1] * 16 + (length - 1) % 16)

    embedding = normal(50, hidden).to(BF16)
    cos_sin = (normal(longest + 1, dim // 2) * 3).float()
    cos_sin = torch.cat((cos_sin.cos(), cos_sin.sin()), 1).contiguous()
    made = [
        ResidentLayer(
            input_norm=norm(hidden),
            qkv=weight(shape.qkv_width, hidden),
            q_norm=norm(dim) if shape.qk_norm else None,
            k_norm=norm(dim) if shape.qk_norm else None,
            output=weight(hidden, shape.attended),
            post_norm=norm(hidden),
            gate_up=weight(2 * inner, hidden),
            down=weight(hidden, inner),
            keys=cache[:, index, 0],
            values=cache[:, index, 1],
        )
        for index in range(layers)
    ]
    tokens = [chance.randrange(50) for _ in lengths]
    decoder = ResidentDecoder(kernels, shape, embedding, made, cos_sin, eps=EPS)
    outputs, new_kv = zip(
        *(
            reference(shape, made, embedding[token], past, cos_sin[length - 1].double())
            for token, past, length in zip(tokens, old, lengths, strict=True)
        ),
        strict=True,
    )

    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    return Case(
        decoder=decoder,
        tokens=ints(tokens + [0] * padding),
        positions=ints([length - 1 for length in lengths] + [0] * padding),
        slots=ints(slots + [0] * padding),
        rows=ints(device_rows + [count + 4] * padding),
        q_start=ints([*range(count + 1)] + [count] * padding),
        kv_len=ints([length - 1 for length in lengths] + [0] * padding),
        table=table.cuda(),
        cache=cache,
        expected=torch.stack(outputs),
        expected_kv=torch.stack(new_kv),
        count=count,
        head_dim=dim,
    )


def reference(
    shape: DecoderShape, layers: list[ResidentLayer], x: Tensor, past: Tensor, angles: Tensor
) -> tuple[Tensor, Tensor]:
    """One token [H] through the layers in float64; past [tokens, layers, 2, kv heads, D]; angles
    [D]: cosines, then sines. Gives [H] and the token's own [layers, 2, kv heads, D]."""
    dim, kv_heads = shape.head_dim, shape.num_kv_heads
    x = x.double()

    def rms(x: Tensor, gains: Tensor | None) -> Tensor:
        if gains is None:
            return x
        return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * gains.double()

    def rotated(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        cosine, sine = angles.chunk(2)
        return torch.cat((low * cosine - high * sine, high * cosine + low * sine), -1)

    fresh = []
    for index, layer in enumerate(layers):
        heads = (layer.qkv.double() @ rms(x, layer.input_norm)).view(-1, dim)
        q, k, v = heads.split([shape.num_heads, kv_heads, kv_heads])
        q, k = rotated(rms(q, layer.q_norm)), rotated(rms(k, layer.k_norm))
        fresh.append(torch.stack((k, v)))
        keys, values = (
            torch.cat((past[:, index, which], new[None])).repeat_interleave(shape.group, 1)
            for which, new in enumerate((k, v))
        )
        weights = (torch.einsum("hd,thd->ht", q, keys) * dim**-0.5).softmax(-1)
        x = x + layer.output.double() @ torch.einsum("ht,thd->hd", weights, values).flatten()
        gate, up = (layer.gate_up.double() @ rms(x, layer.post_norm)).chunk(2)
        x = x + layer.down.double() @ (torch.nn.functional.silu(gate) * up)
    return x, torch.stack(fresh)


@gpu
@pytest.mark.parametrize("lengths", [[1], [16], [17], [300], [4, 130, 65]], ids=str)
def test_small(kernels: KernelLibrary, lengths: list[int]) -> None:
    make_case(kernels, TINY, lengths, padding=int(len(lengths) > 1)).check()


@gpu
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("lengths", "padding"),
    [([1152], 0), ([5000], 0), ([33, 700], 0), ([1, 2, 900], 1), ([16, 5000, 1, 31, 400], 3),
     ([257] * 8, 0)],
    ids=str,
)  # fmt: skip
def test_layers_are_those_of_float64(
    kernels: KernelLibrary, name: str, lengths: list[int], padding: int
) -> None:
    make_case(kernels, SHAPES[name], lengths, padding=padding).check()


@gpu
def test_more_heads_than_thread_blocks(kernels: KernelLibrary) -> None:
    shape = DecoderShape(64, 128, 32, 32, 64, True, 2)
    make_case(kernels, shape, [200, 1, 77, 40], padding=2).check()


@gpu
def test_the_same_step_gives_the_same_bits(kernels: KernelLibrary) -> None:
    case = make_case(kernels, SHAPES["0.6b"], [1152, 40, 700], padding=1)
    first = case.run().clone()
    for _ in range(20):
        assert torch.equal(case.run()[: case.count], first[: case.count])


@gpu
def test_a_graph_serves_steps_of_other_lengths(kernels: KernelLibrary) -> None:
    case = make_case(kernels, TINY, [400, 3, 90], padding=1)
    case.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run()
    for lengths in ([400, 3, 90], [33, 2, 17], [1, 1, 64]):
        for row, length in enumerate(lengths):
            case.kv_len[row] = case.positions[row] = length - 1
            block = case.table[case.rows[row], (length - 1) // 16]
            case.slots[row] = block * 16 + (length - 1) % 16
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out[:3], case.run()[:3])
    assert relative_error(out[:3], case.expected) > TOLERANCE
