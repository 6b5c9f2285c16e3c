"""Products with many rows and what follows them: ours, and cuBLAS's with a kernel behind it.

    python benchmarks/kernels_many.py --json benchmarks/results/many-DATE.json

Shapes of real models, eight products in a graph, for 20 ms at a time: a card at its power limit is
slower than that (docs/decisions/068-prefill-and-power.md).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from kernels_linear import MODELS, time_graph, write_result
from torch import Tensor

from zllm.cuda.activation import silu_mul
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.linear_many import HEAD_DIM, ManyRows
from zllm.cuda.rope_cache import RopeCache, rope_cache

ROWS = (512, 1024, 1536, 2048, 3072, 4096, 8192, 16384)
KV_HEADS = 8
_IN_A_GRAPH = 8
Call = Callable[[], object]


def _random(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


def _rope(rows: int, num_heads: int) -> RopeCache:
    """Prompts of 1,024 tokens, each in blocks of its own."""
    cache = torch.zeros(2, rows // 16 + 2, KV_HEADS, 16, HEAD_DIM, device="cuda").bfloat16()
    gains = _random(HEAD_DIM)
    token = torch.arange(rows, device="cuda")
    return RopeCache(
        positions=(token % 1024).int(),
        slots=token.int() + 16,
        keys=cache[0],
        values=cache[1],
        cos_sin=torch.randn(1024, HEAD_DIM, device="cuda"),
        num_heads=num_heads,
        q_norm=gains,
        k_norm=gains,
    )


def cases(kernels: KernelLibrary, rows: int) -> Iterator[tuple[str, str, bool, Call, Call]]:
    """Model, product, whether the engine takes ours, ours, and what it else takes."""
    many = ManyRows(kernels)

    def qkv_apart(x: Tensor, weight: Tensor, rope: RopeCache) -> Tensor:
        return rope_cache(kernels, F.linear(x, weight), rope)

    def gated_apart(x: Tensor, weight: Tensor) -> Tensor:
        return silu_mul(kernels, F.linear(x, weight))

    for name, model in MODELS.items():
        (n, k), (both, _) = model.qkv, model.gate_up
        x, rope = _random(rows, k), _rope(rows, n // HEAD_DIM - 2 * KV_HEADS)
        operands = x, _random(n, k, scale=0.02), rope
        taken = many.supports_qkv(rows, n, k, HEAD_DIM, x.dtype)
        ours, theirs = partial(many.qkv, *operands), partial(qkv_apart, *operands)
        yield name, "qkv, QK-norm, RoPE, cache write", taken, ours, theirs
        pair = x, _random(both, k, scale=0.02)
        taken = many.supports_gated(rows, both, k, x.dtype)
        yield (
            name,
            "gate and up, SwiGLU",
            taken,
            partial(many.gated, *pair),
            partial(gated_apart, *pair),
        )


def _several(call: Call) -> None:
    for _ in range(_IN_A_GRAPH):
        call()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write all results")
    args = parser.parse_args()
    kernels = KernelLibrary()
    found = []
    for rows in ROWS:
        for model, product, taken, ours, theirs in cases(kernels, rows):
            mine, other = (time_graph(partial(_several, call), 20) for call in (ours, theirs))
            found.append(
                {
                    "model": model,
                    "product": product,
                    "rows": rows,
                    "us": round(mine / _IN_A_GRAPH * 1e3, 1),
                    "cublas_us": round(other / _IN_A_GRAPH * 1e3, 1),
                    "taken": taken,
                }
            )
            print(json.dumps(found[-1]), flush=True)
    write_result(args.json, products=found)


if __name__ == "__main__":
    main()
