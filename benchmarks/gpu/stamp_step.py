"""When the thread blocks of a decode step's layers start, get their data and end: to 32 ns.

    python benchmarks/gpu/stamp_step.py 0.6b --sequences 64

Kernels of one layer overlap, so that a profiler's times of each say little about who waits for
whom. So a copy of cuda/ gets stamps of the device's clock (%globaltimer), by one thread of each
block, and the layers run in a graph as benchmarks/kernels_decoder.py builds them. Stamps cost 1%.

Printed for each kernel, in the order of a layer from attention's end on: the first, the median and
the last block's microseconds since the last block of that attention ended, medians over layers.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import kernels_decoder
import torch
from kernels_linear import time_graph
from torch import Tensor

import zllm.cuda.compiler
from zllm.cuda.attention import AttentionSpec, PagedAttention
from zllm.cuda.compiler import Compiler
from zllm.cuda.launcher import KernelLibrary
from zllm.runtime.model_config import ModelConfig

KERNELS = ("output", "gate_up", "down", "qkv", "rope", "attention")
NEXT_LAYER = ("qkv", "rope", "attention")
"""Those that come before the attention of their own layer."""
EVENTS = ("started", "waited", "first data", "last data", "ended")
MOST_BLOCKS, MOST_LAYERS = 512, 64

_STAMPS = """
struct Stamps {
  static constexpr int kEvents = %(events)d;
  u64 times[kEvents] = {};
  u64* record;
  u64 launch;
  bool here;

  // One thread of a block. Which layer this is, the block's own count of launches tells.
  __device__ Stamps(int kernel, bool here) : here(here) {
    if (!here) return;
    u64* const counts = reinterpret_cast<u64*>(%(address)dull);
    const int block = kernel * %(blocks)d + blockIdx.y * gridDim.x + blockIdx.x;
    launch = atomicAdd(counts + block, 1ull);
    record = counts + %(kernels)d * %(blocks)d + i64(block) * (%(most_layers)d * kEvents);
    mark(0);
  }
  __device__ void mark(int event) {
    asm volatile("mov.u64 %%0, %%globaltimer;" : "=l"(times[event])::"memory");
  }
  __device__ void mark_first(int event) {
    if (times[event] == 0) mark(event);
  }
  __device__ void end() {
    if (!here) return;
    mark(kEvents - 1);
    for (int i = 0; i < kEvents; ++i) record[launch %% %(layers)d * kEvents + i] = times[i];
  }
};
"""


def put_stamps(root: Path, config: ModelConfig, address: int) -> None:
    """Into the kernels of `root`, a copy of cuda/: they write to `records_like()` at `address`."""
    common = root / "include/common.cuh"
    values = {
        "events": len(EVENTS),
        "kernels": len(KERNELS),
        "blocks": MOST_BLOCKS,
        "most_layers": MOST_LAYERS,
        "layers": config.num_layers,
        "address": address,
    }
    common.write_text(common.read_text() + _STAMPS % values)
    hidden, inter = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    shapes = {"output": (hidden, queries), "gate_up": (inter, hidden), "down": (hidden, inter)}
    which = f"{KERNELS.index('qkv')}"
    for name, (n, k) in shapes.items():
        which = f"n == {n} && k == {k} ? {KERNELS.index(name)} : {which}"
    _insert(
        root / "kernels/linear_wgmma.cu",
        before={
            "  const int first = min(": f"  Stamps stamps({which}, threadIdx.x == 0);\n",
            "    wgmma_fence();\n": "    stamps.mark_first(2);\n",
            "\n#endif\n}": "\n  stamps.end();",
        },
        behind={
            "  wait_for_previous();\n": "  stamps.mark(1);\n",
            "  wgmma_wait<0>();\n": "  stamps.mark(3);\n",
        },
    )
    rope, attention = KERNELS.index("rope"), KERNELS.index("attention")
    _insert(
        root / "kernels/rope_cache.cu",
        before={
            "  let_next_start();\n": f"  Stamps stamps({rope}, threadIdx.x == 0);\n",
            "  const int row = slot": "  stamps.mark(1);\n",
        },
        behind={"      store_vec(p + HEAD_DIM / 2, b);\n": "      stamps.end();\n"},
    )
    _insert(
        root / "kernels/attention_decode.cu",
        before={
            "  let_next_start();\n": f"  Stamps stamps({attention}, threadIdx.x == 0);\n",
            "      const int valid = walk.tokens_in(": "      stamps.mark_first(2);\n",
        },
        behind={
            "  wait_for_previous();\n": "  stamps.mark(1);\n",
            "    accumulator.finish();\n": "    stamps.mark(3);\n",
            "results take the shared memory\n  }\n": "  stamps.end();\n",
        },
    )


def _insert(path: Path, *, before: dict[str, str], behind: dict[str, str]) -> None:
    """Text at places of the source, each of which is to stand there once."""
    text = path.read_text()
    for place in (*before, *behind):
        if text.count(place) != 1:
            raise SystemExit(
                f"{path.name} has changed: {place!r} stands there {text.count(place)}x"
            )
        text = text.replace(place, before.get(place, "") + place + behind.get(place, ""))
    path.write_text(text)


def records_like() -> Tensor:
    """What stamps are written to: each block's count of launches, then its records."""
    blocks = len(KERNELS) * MOST_BLOCKS
    return torch.zeros(blocks * (1 + MOST_LAYERS * len(EVENTS)), dtype=torch.int64)


def time_line(records: Tensor, layers: int) -> list[tuple[str, str, float, float, float]]:
    """(kernel, event, first, median and last block's microseconds), medians over inner layers."""
    blocks = len(KERNELS) * MOST_BLOCKS
    times = records[blocks:].view(len(KERNELS), MOST_BLOCKS, MOST_LAYERS, len(EVENTS))
    lines = []
    attention = times[KERNELS.index("attention")]
    for index, kernel in enumerate(KERNELS):
        for event, name in enumerate(EVENTS):
            found = []
            for layer in range(3, layers - 2):
                origin = attention[:, layer, -1].max()
                all_blocks = times[index, :, layer + (kernel in NEXT_LAYER), event]
                some = (all_blocks[all_blocks > 0] - origin).double() / 1e3
                if some.numel():
                    found.append(torch.stack([some.min(), some.median(), some.max()]))
            if found:
                first, middle, last = torch.stack(found).median(dim=0).values.tolist()
                lines.append((kernel, name, first, middle, last))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=kernels_decoder.MODELS)
    parser.add_argument("--sequences", type=int, default=64, help="9 or more")
    parser.add_argument("--tokens", type=int, default=1152, help="of each")
    args = parser.parse_args()
    kernels_decoder.BATCHES[args.model] = [(args.sequences, args.tokens)]
    plain = KernelLibrary()
    bench = kernels_decoder.Bench(plain, args.model)
    config = bench.config
    records = records_like().cuda()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "cuda"
        shutil.copytree(Path(zllm.cuda.compiler.__file__).parent, root)
        put_stamps(root, config, records.data_ptr())
        for name, kernels in (
            ("without stamps", plain),
            ("with stamps", KernelLibrary(Compiler(root=root, cache_dir=Path(folder)))),
        ):
            dtype = torch.bfloat16
            spec = AttentionSpec(
                config.num_heads, config.num_kv_heads, config.head_dim, dtype, dtype
            )
            bench.attention = PagedAttention(
                kernels, spec, max_rows=args.sequences, max_tokens=args.sequences
            )
            ops = kernels_decoder.OneByOne(kernels, bench.attention)
            step = bench.step(ops, args.sequences, args.tokens)
            print(f"layers {name}: {time_graph(step, 20):.3f} ms", flush=True)
    for kernel, event, *times in time_line(records.cpu(), config.num_layers):
        print(f"{kernel:10}{event:11}" + "".join(f"{time:9.2f}" for time in times))


if __name__ == "__main__":
    main()
