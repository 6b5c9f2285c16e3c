"""Each kernel's time, and its share of what the device can do, measured in the same run.

    python benchmarks/kernels.py [--only NAME ...] [--json FILE]

A case's calls work on different tensors, together larger than the L2 where bandwidth is the
limit, and make one CUDA graph; the median replay counts. Bandwidth counts bytes read plus
written, as the copy does that it is held against. Where launches are the limit the time is that
of a launch inside a graph. Attention and the skinny products have their own files beside this.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch

from zllm.cuda.activation import silu_mul
from zllm.cuda.batch import Arenas, BatchExpander, BatchTables, allocate
from zllm.cuda.blocks import copy_blocks
from zllm.cuda.embedding import take_rows
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.norm import add_rms_norm, rms_norm
from zllm.cuda.rope_cache import RopeCache, rope_cache
from zllm.cuda.sampler import SampledRows, Sampler
from zllm.native import arena

BF16, INT = torch.bfloat16, torch.int32
VOCAB = 151936
L2_BYTES = 4 * 60 * 2**20
"""What the calls of a case must touch so that none finds its data in the L2."""
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    name: str
    bytes: int
    """Read plus written by one call, each once."""
    make: Callable[[], Call]
    """Draws one call's tensors."""


@dataclass(frozen=True)
class Result:
    name: str
    microseconds: float
    bytes: int
    share_of_copy: float
    limit: str


def seconds(call: Call, repeats: int = 15) -> float:
    """The median time of `call` by events, after warming up."""
    call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return float(statistics.median(times))


def copy_bandwidth() -> float:
    """Bytes a second of a device-to-device copy of 4 GiB, read plus written."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def measure(case: Case, copy: float) -> Result:
    calls = [case.make() for _ in range(max(2, min(16, math.ceil(L2_BYTES / case.bytes))))]
    rounds = max(1, 32 // len(calls))
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    each = seconds(graph.replay) / (rounds * len(calls))
    share = case.bytes / each / copy
    return Result(
        case.name, each * 1e6, case.bytes, share, "bandwidth" if share > 0.3 else "latency"
    )


def rows_cases(kernels: KernelLibrary) -> Iterator[Case]:
    for rows, hidden in (
        *((n, 1024) for n in (1, 64, 256, 8192, 32768)),
        *((n, 2560) for n in (1, 8192)),
        *((n, 4096) for n in (1, 256, 8192)),
        (8192, 5120),
    ):

        def norm(add: bool, rows: int = rows, hidden: int = hidden) -> Call:
            x, residual = torch.randn(2, rows, hidden, device="cuda", dtype=BF16)
            weight = torch.randn(hidden, device="cuda", dtype=BF16)
            out = torch.empty_like(x)
            if add:
                return lambda: add_rms_norm(kernels, x, residual, weight, 1e-6, out=out)
            return lambda: rms_norm(kernels, x, weight, 1e-6, out=out)

        size = rows * hidden * 2
        yield Case(f"rms_norm {rows} x {hidden}", 2 * size, partial(norm, False))
        yield Case(f"add_rms_norm {rows} x {hidden}", 4 * size, partial(norm, True))
    for rows, inter in (
        *((n, 3072) for n in (1, 256, 8192, 32768)),
        (8192, 9728),
        (8192, 12288),
    ):

        def gate(rows: int = rows, inter: int = inter) -> Call:
            gate_up = torch.randn(rows, 2 * inter, device="cuda", dtype=BF16)
            out = torch.empty(rows, inter, device="cuda", dtype=BF16)
            return lambda: silu_mul(kernels, gate_up, out=out)

        yield Case(f"silu_mul {rows} x {inter}", 3 * rows * inter * 2, gate)
    for rows in (1, 256, 8192):

        def embed(rows: int = rows) -> Call:
            table = torch.randn(VOCAB, 1024, device="cuda", dtype=BF16)
            index = torch.randint(VOCAB, (rows,), device="cuda", dtype=INT)
            out = torch.empty(rows, 1024, device="cuda", dtype=BF16)
            return lambda: take_rows(kernels, table, index, out=out)

        yield Case(f"take_rows {rows} x 1024", 2 * rows * 2048, embed)


def cache_cases(kernels: KernelLibrary) -> Iterator[Case]:
    size, max_len, pool = 128, 40960, 8192
    angles = torch.rand(max_len, size, device="cuda")
    for tokens, heads, kv_heads in (
        (1, 32, 8),
        (256, 32, 8),
        (8192, 32, 8),
        (256, 16, 8),
        (8192, 16, 8),
    ):

        def rope(tokens: int = tokens, heads: int = heads, kv_heads: int = kv_heads) -> Call:
            keys, values = torch.zeros(2, pool, kv_heads, 16, size, device="cuda", dtype=BF16)
            qkv = torch.randn(tokens, (heads + 2 * kv_heads) * size, device="cuda", dtype=BF16)
            positions = torch.randint(max_len, (tokens,), device="cuda", dtype=INT)
            slots = torch.randperm(pool * 16, device="cuda")[:tokens].int()
            weight = torch.randn(size, device="cuda", dtype=BF16)
            out = torch.empty(tokens, heads, size, device="cuda", dtype=BF16)
            into = RopeCache(
                positions, slots, keys, values, angles, heads, q_norm=weight, k_norm=weight
            )
            return lambda: rope_cache(kernels, qkv, into, out=out)

        name = f"rope_cache {tokens} tokens, {heads}/{kv_heads} heads of {size}"
        yield Case(name, 2 * tokens * (heads + 2 * kv_heads) * size * 2, rope)

    def copies() -> Call:
        data = torch.randn(2048, 1, 1 << 19, device="cuda", dtype=BF16)
        pairs = torch.randperm(2048, device="cuda", dtype=INT)
        count = torch.tensor([256], device="cuda", dtype=INT)
        return lambda: copy_blocks(kernels, data, data, pairs, count)

    yield Case("copy_blocks 256 x 1 MiB", 2 * 256 * 2**20, copies)


def step_cases(kernels: KernelLibrary) -> Iterator[Case]:
    expand = BatchExpander(kernels, arena.MACROS)
    for rows in (1, 256):

        def batch(rows: int = rows) -> Call:
            words = torch.zeros(65536, dtype=INT)
            at = arena.HEADER_WORDS
            sections = {
                "ROWS": torch.arange(rows),
                "Q_START": torch.arange(rows + 1),
                "KV_LEN": torch.full((rows,), 1000),
                "FLAGS": torch.full((rows,), arena.F_SAMPLE | arena.F_TOKEN_ON_DEVICE),
                "TOKENS": torch.zeros(rows),
                "TABLE_UPDATES": torch.arange(rows // 16 * 3) % 200,
                "PARAM_UPDATES": torch.zeros(0),
            }
            for name, section in sections.items():
                words[getattr(arena, f"H_{name}")] = at
                words[at : at + len(section)] = section.int()
                at += len(section)
            words[arena.H_NUM_ROWS] = words[arena.H_NUM_TOKENS] = rows
            words[arena.H_NUM_TABLE_UPDATES] = rows // 16
            shapes = ((257, 2560), (257, arena.PARAM_WORDS), (257,))
            tables = BatchTables(*(torch.zeros(s, device="cuda", dtype=INT) for s in shapes))
            target = allocate(rows, rows, rows, kernels.device)
            arenas = Arenas.allocate(len(words), kernels.device)
            arenas.own[: len(words)] = words  # as no other is due, this one is expanded every time
            return lambda: expand(arenas, tables, target)

        yield Case(f"expand batch, {rows} decodes (2 launches)", rows * 60, batch)

    settings = {
        "greedy": {},
        "temperature": {"TEMPERATURE": 1.0},
        "top-k 50 + top-p 0.9": {"TEMPERATURE": 1.0, "TOP_K": 50, "TOP_P": 0.9},
        "top-p 0.9": {"TEMPERATURE": 1.0, "TOP_P": 0.9},
    }
    for rows, spread in ((1, 1.0), (64, 1.0), (256, 1.0), (256, 4.0)):
        sampler = Sampler(kernels, arena.MACROS, BF16, VOCAB, rows)
        for label, values in settings.items():

            def sample(
                rows: int = rows,
                spread: float = spread,
                sampler: Sampler = sampler,
                values: dict[str, float] = values,
            ) -> Call:
                logits = (torch.randn(rows, VOCAB, device="cuda") * spread).to(BF16)
                params = torch.zeros(rows + 1, arena.PARAM_WORDS)
                params[:, arena.P_TOP_P] = 1.0
                for name, value in values.items():
                    word = getattr(arena, f"P_{name}")
                    target = params if isinstance(value, float) else params.view(INT)
                    target[:, word] = value
                index = torch.arange(rows, device="cuda", dtype=INT)
                where = SampledRows(index, index, index, params.view(INT).cuda())
                tokens = torch.empty_like(index)
                last = torch.zeros(rows + 1, device="cuda", dtype=INT)
                return lambda: sampler.sample(logits, where, tokens, last)

            name = f"sample {rows} x {VOCAB}, sigma {spread:g}, {label}"
            yield Case(name, rows * VOCAB * 2, sample)
    for rows, top in ((1, 5), (64, 0), (64, 20)):

        def logprobs(rows: int = rows, top: int = top) -> Call:
            sampler = Sampler(kernels, arena.MACROS, BF16, VOCAB, rows)
            logits = torch.randn(rows, VOCAB, device="cuda").to(BF16)
            chosen = torch.randint(VOCAB, (rows,), device="cuda", dtype=INT)
            out = sampler.allocate_logprobs(rows, top)
            return lambda: sampler.logprobs(logits, chosen, out)

        yield Case(f"logprobs {rows} x {VOCAB}, top {top}", rows * VOCAB * 2, logprobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", default=[""], help="cases whose names hold one of these"
    )
    parser.add_argument("--json", help="write the results here")
    arguments = parser.parse_args()
    kernels = KernelLibrary()
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: a copy moves {copy / 1e12:.2f} TB/s\n")
    print(f"{'kernel':58s} {'us':>8s} {'TB/s':>6s} {'of copy':>8s}  limit")
    results = []
    for source in (rows_cases, cache_cases, step_cases):
        for case in source(kernels):
            if not any(part in case.name for part in arguments.only):
                continue
            r = measure(case, copy)
            results.append(r)
            rate = r.bytes / r.microseconds / 1e6
            print(
                f"{r.name:58s} {r.microseconds:8.2f} {rate:6.2f} {r.share_of_copy:8.1%}  {r.limit}"
            )
    if arguments.json:
        report = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "copy_bytes_per_s": copy,
            "results": [asdict(r) for r in results],
        }
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
