"""Times paged attention on a GPU, against the device's copy bandwidth and product rate.

    python benchmarks/kernels_attention.py [--json FILE] [--only NAME ...] [--full-pool]

A decode's ceiling is the bytes of KV it must read at the rate of a device-to-device copy (bytes
read plus written), a prefill's the operations under the causal mask at the rate of an 8192^3
bfloat16 product; both are measured in the same run. Launches over the layers of a pool that is
larger than the L2 make one CUDA graph, and the median replay counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from zllm.cuda.attention import AttentionSpec, PagedAttention
from zllm.cuda.launcher import KernelLibrary

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


@dataclass(frozen=True)
class Shape:
    """A batch: rows as (query tokens, cached tokens, how many)."""

    name: str
    rows: tuple[tuple[int, int, int], ...]
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    kv_dtype: torch.dtype = BF16
    layers: int = 4

    @property
    def decode_only(self) -> bool:
        return all(queries == 1 for queries, _, _ in self.rows)

    @property
    def kv_bytes(self) -> int:
        """Of one layer's keys and values, each read once."""
        tokens = sum(n * (queries + cached) for queries, cached, n in self.rows)
        return tokens * self.kv_heads * self.head_dim * 2 * self.kv_dtype.itemsize

    @property
    def flop(self) -> int:
        """Multiplications and additions under the causal mask."""
        pairs = sum(n * (q * cached + q * (q + 1) // 2) for q, cached, n in self.rows)
        return 4 * pairs * self.heads * self.head_dim


@dataclass
class Result:
    name: str
    microseconds: float
    plan_microseconds: float
    share: float
    """Of the ceiling that `limit` names."""
    limit: str
    rate: float
    """bytes/s or FLOP/s."""
    layout: str = "layer-major"


@dataclass
class Report:
    device: str
    torch: str
    cuda: str | None
    copy_bytes_per_s: float
    product_flop_per_s: float
    results: list[Result] = field(default_factory=list)


DECODES = [
    Shape("decode 32 x 4096", ((1, 4095, 32),)),
    Shape("decode 1 x 131072 + 31 x 4096", ((1, 131071, 1), (1, 4095, 31))),
    Shape("decode 1 x 1024", ((1, 1023, 1),), layers=36),
    Shape("decode 32 x 4096 fp8", ((1, 4095, 32),), kv_dtype=FP8, layers=8),
    Shape("decode 64 x 1152, 16/8 heads", ((1, 1151, 64),), heads=16, layers=8),
    Shape("decode 256 x 1152, 16/8 heads", ((1, 1151, 256),), heads=16),
    Shape("decode 1024 x 512", ((1, 511, 1024),)),
    Shape("decode 256 x 200", ((1, 199, 256),), layers=12),
    Shape("decode 64 x 20 + 64 x 2000", ((1, 19, 64), (1, 1999, 64))),
    Shape("decode 64 x 1024, 8/4 heads of 64", ((1, 1023, 64),), 8, 4, 64, layers=16),
    Shape("decode 64 x 2048, 8/4 heads of 256", ((1, 2047, 64),), 8, 4, 256),
]
PREFILLS = [
    Shape("prefill 1 x 4096", ((4096, 0, 1),)),
    Shape("prefill 1 x 8192", ((8192, 0, 1),)),
    Shape("prefill 8 x 1024", ((1024, 0, 8),)),
    Shape("prefill 8 x 1024, 16/8 heads", ((1024, 0, 8),), heads=16),
    Shape("prefill 2 x 4096 after 4096", ((4096, 4096, 2),)),
    Shape("prefill 512 after 16384", ((512, 16384, 1),)),
    Shape("prefill 100 after 8192", ((100, 8192, 1),), layers=16),
    Shape("prefill 64 after 32768 + 32 decodes", ((1, 4095, 32), (64, 32768, 1))),
    Shape("prefill 1 x 4096, heads of 256", ((4096, 0, 1),), 8, 4, 256),
    Shape("prefill 1 x 4096, heads of 64", ((4096, 0, 1),), head_dim=64),
    Shape("prefill 1 x 4096 fp8", ((4096, 0, 1),), kv_dtype=FP8),
]


def median_seconds(run: Callable[[], object], repeats: int = 11, warm_ups: int = 20) -> float:
    for _ in range(warm_ups):  # the clocks settle after what ran before
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # cycles: launching is done before the device begins
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return float(statistics.median(times))


def graph_of(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def copy_rate() -> float:
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source))


def product_rate() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=BF16) for _ in range(2))
    return float(2 * 8192**3 / median_seconds(lambda: a @ b, warm_ups=3))


def random_pool(num: int, dtype: torch.dtype) -> Tensor:
    if dtype == FP8:
        return torch.randint(0, 0x50, (num,), dtype=torch.uint8, device="cuda").view(FP8)
    return torch.empty(num, dtype=dtype, device="cuda").normal_()


def layers_of(pool: Tensor, shape: Shape, layers: int, layout: str) -> list[tuple[Tensor, Tensor]]:
    """Keys and values by layer: views [blocks, Hkv, 16, D] of the pool."""
    block = (shape.kv_heads, 16, shape.head_dim)
    if layout == "block-major":
        cache = pool.view(-1, layers, 2, *block)
        return [(cache[:, i, 0], cache[:, i, 1]) for i in range(layers)]
    cache = pool.view(layers, 2, -1, *block)
    return [(cache[i, 0], cache[i, 1]) for i in range(layers)]


def measure(
    library: KernelLibrary,
    report: Report,
    shape: Shape,
    pool: Tensor | None = None,
    layers: int = 0,
    layout: str = "layer-major",
    portable: bool = False,
) -> Result:
    spec = AttentionSpec(shape.heads, shape.kv_heads, shape.head_dim, BF16, shape.kv_dtype)
    rows = [(q, cached) for q, cached, n in shape.rows for _ in range(n)]
    counts = [-(-(q + cached) // 16) for q, cached in rows]
    layers = layers or shape.layers
    block_elements = 2 * shape.kv_heads * 16 * shape.head_dim
    if pool is None:
        pool = random_pool((sum(counts) + 1) * layers * block_elements, shape.kv_dtype)
    num_blocks = pool.numel() // (layers * block_elements)
    order = torch.randperm(num_blocks - 1)[: sum(counts)].int() + 1
    table = torch.zeros(len(rows), max(counts), dtype=torch.int32)
    for i, part in enumerate(order.split(counts)):
        table[i, : len(part)] = part
    tokens = sum(q for q, _ in rows)

    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    starts = [sum(q for q, _ in rows[:i]) for i in range(len(rows) + 1)]
    step = ints(list(range(len(rows)))), ints(starts), ints([cached for _, cached in rows])
    q = torch.randn(tokens, shape.heads, shape.head_dim, device="cuda", dtype=BF16)
    scales = (torch.ones(1, device="cuda"), torch.ones(1, device="cuda"))
    attention = PagedAttention(
        library, spec, max_rows=len(rows), max_tokens=tokens, portable=portable
    )
    caches = layers_of(pool, shape, layers, layout)
    device_table, out = table.cuda(), torch.empty_like(q.flatten(1))

    work = attention.plan(*step, num_tokens=tokens, decode_only=shape.decode_only)

    def all_layers() -> None:
        for keys, values in caches:
            attention.run(
                q,
                keys,
                values,
                device_table,
                work,
                scale=shape.head_dim**-0.5,
                out=out,
                k_scale=scales[0] if spec.fp8 else None,
                v_scale=scales[1] if spec.fp8 else None,
            )

    seconds = median_seconds(graph_of(all_layers).replay) / layers

    def all_lists() -> None:
        for _ in range(8):
            attention.make_lists(work)

    plan_graph = graph_of(all_lists)
    plan_seconds = median_seconds(plan_graph.replay) / 8
    if shape.decode_only:
        rate, ceiling, limit = shape.kv_bytes / seconds, report.copy_bytes_per_s, "bandwidth"
    else:
        rate, ceiling, limit = shape.flop / seconds, report.product_flop_per_s, "arithmetic"
    name = shape.name + (", portable" if portable else "")
    return Result(name, seconds * 1e6, plan_seconds * 1e6, rate / ceiling, limit, rate, layout)


def show(report: Report, result: Result) -> None:
    report.results.append(result)
    print(
        f"{result.name:40} {result.layout:12} {result.microseconds:10.1f} us  "
        f"{result.rate / 1e12:8.2f} T/s  {result.share:6.1%} of {result.limit}  "
        f"(plan {result.plan_microseconds:.1f} us)",
        flush=True,
    )


def measure_layouts(library: KernelLibrary, report: Report) -> None:
    """Both layouts of a pool of 36 layers, on the same memory, filled with random numbers."""
    shape, layers = DECODES[0], 36
    block_elements = 2 * shape.kv_heads * 16 * shape.head_dim
    for gigabytes in (50, 100):
        num_blocks = gigabytes * 10**9 // (2 * layers * block_elements)
        pool = random_pool(num_blocks * layers * block_elements, BF16)
        for layout in ("block-major", "layer-major", "block-major", "layer-major"):
            result = measure(library, report, shape, pool, layers, layout)
            result.name += f", pool of {gigabytes} GB"
            show(report, result)
        del pool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the report here")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="shapes whose names hold one of these"
    )
    parser.add_argument("--full-pool", action="store_true", help="compare the cache layouts")
    parser.add_argument("--portable", action="store_true", help="also the path of sm_80")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    report = Report(
        torch.cuda.get_device_name(),
        torch.__version__,
        torch.version.cuda,
        copy_rate(),
        product_rate(),
    )
    print(
        f"{report.device}: copy {report.copy_bytes_per_s / 1e12:.3f} TB/s, "
        f"product {report.product_flop_per_s / 1e12:.0f} TFLOP/s"
    )
    library = KernelLibrary()
    for shape in DECODES + PREFILLS:
        if any(part in shape.name for part in arguments.only):
            show(report, measure(library, report, shape))
            if arguments.portable:
                show(report, measure(library, report, shape, portable=True))
    if arguments.full_pool:
        measure_layouts(library, report)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(asdict(report), file, indent=1)


if __name__ == "__main__":
    main()
