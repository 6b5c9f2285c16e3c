"""A decode step's layers as one resident grid and as one kernel after the other, in graphs.

    python benchmarks/kernels_decoder.py --json benchmarks/results/decoder-DATE.json

Random weights in the models' real shapes (benchmarks/models/), random KV. The floor is what the
layers must read, weights and KV, over the bandwidth that reading 4 GB reaches in the same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from kernels_linear import read_bandwidth, time_graph, write_result
from torch import Tensor

from zllm.cuda.attention import AttentionSpec, PagedAttention
from zllm.cuda.launcher import KernelLibrary
from zllm.runtime.cuda_ops import CudaOps
from zllm.runtime.kv_cache import KVCache, allocate_kv_cache
from zllm.runtime.loader import dummy_weights
from zllm.runtime.model_config import ModelConfig
from zllm.runtime.models.qwen3 import Qwen3
from zllm.runtime.ops import Batch, Decoder

MODELS = ("0.6b", "4b", "8b")
BATCHES = {"0.6b": [(1, 1152), (2, 1152), (4, 1152), (8, 1152), (1, 32768), (8, 32768)]}
BATCHES |= {name: [(1, 1152), (2, 1152), (4, 1152), (8, 1152)] for name in ("4b", "8b")}
"""(sequences, tokens of each)."""


class OneByOne(CudaOps):
    """The same operations without the resident grid."""

    def decode(self, decoder: Decoder, batch: Batch, cache: KVCache) -> Tensor | None:
        return None


class Bench:
    """One model with a cache for the largest batch."""

    def __init__(self, kernels: KernelLibrary, name: str) -> None:
        folder = Path(__file__).parent / "models" / f"qwen3-{name}"
        self.config = config = ModelConfig.from_folder(folder)
        device, dtype = torch.device("cuda", kernels.device), torch.bfloat16
        weights = dummy_weights(list(Qwen3.parameters(config)), dtype, device, std=0.02, seed=0)
        self.model = Qwen3(config, weights, config.max_position_embeddings, device)
        self.blocks = max(count * -(-length // 16) for count, length in BATCHES[name])
        self.cache = allocate_kv_cache(config, self.blocks + 1, dtype, device)
        self.cache.data.normal_()
        spec = AttentionSpec(config.num_heads, config.num_kv_heads, config.head_dim, dtype, dtype)
        self.attention = PagedAttention(kernels, spec, max_rows=8, max_tokens=8)
        self.resident = CudaOps(kernels, self.attention)
        self.one_by_one = OneByOne(kernels, self.attention)

    def layer_bytes(self, count: int, length: int) -> int:
        """What a step's layers read."""
        layer = self.model.decoder.layers[0]
        weights = sum(w.nbytes for w in (layer.qkv, layer.output, layer.gate_up, layer.down))
        kv = 2 * self.config.num_kv_heads * self.config.head_dim * 2
        return self.config.num_layers * (weights + count * length * kv)

    def step(self, ops: CudaOps, count: int, length: int) -> Callable[[], object]:
        """What runs the layers of a step in which each sequence has `length` tokens."""
        each = -(-length // 16)
        table = (torch.randperm(self.blocks)[: count * each] + 1).view(count, each).int()

        def ints(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device="cuda")

        last = [int(block) * 16 + (length - 1) % 16 for block in table[:, -1]]
        kv_len, q_start = ints([length - 1] * count), ints(list(range(count + 1)))
        rows, block_table = ints(list(range(count))), table.cuda()
        tokens, slots = ints([7 * row for row in range(count)]), ints(last)

        def run() -> object:
            work = self.attention.plan(rows, q_start, kv_len, num_tokens=count, decode_only=True)
            batch = Batch(
                tokens, kv_len, slots, rows, q_start, kv_len, rows, rows, block_table, work
            )
            return self.model.forward(ops, batch, self.cache)

        return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--json", type=Path, help="where to write all results")
    args = parser.parse_args()
    kernels = KernelLibrary()
    rate = read_bandwidth(torch.randn(2_000_000_000, device="cuda", dtype=torch.bfloat16))
    print(f"reading: {rate / 1e12:.3f} TB/s", flush=True)
    found = []
    for name in args.models:
        bench = Bench(kernels, name)
        for count, length in BATCHES[name]:
            floor = bench.layer_bytes(count, length) / rate * 1e3
            resident = time_graph(bench.step(bench.resident, count, length), 20)
            apart = time_graph(bench.step(bench.one_by_one, count, length), 20)
            found.append(
                {
                    "model": name,
                    "sequences": count,
                    "tokens": length,
                    "floor_ms": round(floor, 3),
                    "resident_ms": round(resident, 3),
                    "one_by_one_ms": round(apart, 3),
                }
            )
            print(json.dumps(found[-1]), flush=True)
        del bench
        torch.cuda.empty_cache()
    write_result(args.json, read_tb_s=round(rate / 1e12, 3), layers=found)


if __name__ == "__main__":
    main()
