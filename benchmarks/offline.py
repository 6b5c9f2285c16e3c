"""Whole models offline: decode steps, first tokens, the mixed load and start-up, in one run.

    python benchmarks/offline.py --models 0.6b 4b 8b --json FILE

Random weights in the models' real shapes (benchmarks/models/), temperature 0.6, EOS ignored,
prefix caching off. A decode step is (time of 257 tokens - time of 1 token) / 256 at 1,024 prompt
tokens, so its mean context is 1,152 tokens. Medians. The roofline is what the step must read
(weights and KV) over the read bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kernels_linear import read_bandwidth
from random_checkpoint import write_checkpoint

from zllm import LLM, SamplingParams
from zllm.runtime.engine import Engine

HERE = Path(__file__).parent
PROMPT = 1024
DECODED = 256


def ceilings() -> dict[str, float]:
    """Read and copy bandwidth in TB/s and the bf16 8192^3 product in TFLOP/s, measured now. The
    product counts twice: a few, and after half a second of them, at the clock that the power limit
    then leaves."""
    read = read_bandwidth(torch.randn(2_000_000_000, device="cuda", dtype=torch.bfloat16))
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    nbytes = source.numel() * source.element_size()

    def timed(function: Any, repeats: int) -> float:
        function()
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return float(statistics.median(times))

    copy = timed(lambda: target.copy_(source), 10)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = timed(lambda: a @ b, 20)

    def many() -> None:
        for _ in range(300):
            a @ b

    flop = 2 * 8192**3
    return {
        "copy_tb_s": 2 * nbytes / copy / 1e12,
        "read_tb_s": read / 1e12,
        "bf16_tflop_s": flop / product / 1e12,
        "bf16_sustained_tflop_s": 300 * flop / timed(many, 1) / 1e12,
    }


class Bench:
    """`LLM` on random weights, and the load that is put on it. Token ids in, token ids out."""

    def __init__(self, name: str, checkpoint: Path | None = None, **options: Any) -> None:
        start = time.perf_counter()
        self.llm = LLM(
            checkpoint or HERE / "models" / f"qwen3-{name}",
            load_format="auto" if checkpoint else "dummy",
            **{"enable_prefix_caching": False, **options},
        )
        self.start_s = time.perf_counter() - start

    @property
    def engine(self) -> Engine:
        return self.llm.engine

    def run(self, prompts: list[list[int]], outputs: list[int]) -> float:
        """Seconds of LLM.generate, from the call to its return; every output is counted."""
        params = [
            SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=length)
            for length in outputs
        ]
        start = time.perf_counter()
        answers = self.llm.generate(prompts, params)
        elapsed = time.perf_counter() - start
        lengths = [len(answer.outputs[0].token_ids) for answer in answers]
        if lengths != outputs:
            raise RuntimeError(f"{sum(lengths)} tokens came instead of {sum(outputs)}")
        return elapsed

    def prefill(self, sequences: int, length: int, repeats: int) -> float:
        """Median seconds from `sequences` prompts of `length` random ids to their first tokens."""
        return statistics.median(
            self.run(_prompts(sequences, length), [1] * sequences) for _ in range(repeats)
        )

    def decode_step(self, sequences: int, repeats: int) -> float:
        """Median seconds of a decode step at PROMPT tokens of context and more."""
        times = []
        for _ in range(repeats):
            whole = self.run(_prompts(sequences, PROMPT), [DECODED + 1] * sequences)
            first = self.run(_prompts(sequences, PROMPT), [1] * sequences)
            times.append((whole - first) / DECODED)
        return statistics.median(times)


def _prompts(sequences: int, length: int) -> list[list[int]]:
    return [[random.randrange(10_000) for _ in range(length)] for _ in range(sequences)]


def mixed_load() -> tuple[list[list[int]], list[int]]:
    """The field's common mixed load: 256 requests, 133,966 output tokens."""
    random.seed(0)
    prompts = []
    for _ in range(256):
        length = random.randint(100, 1024)
        prompts.append([random.randint(0, 10_000) for _ in range(length)])
    return prompts, [random.randint(100, 1024) for _ in range(256)]


@dataclass(frozen=True)
class Shape:
    """What a model's layers and head multiply by, in elements."""

    layers: int
    layer: int
    """Of a layer's products."""
    head: int
    heads: int
    """Query heads times their size."""
    kv: int
    """Key and value heads times their size."""

    @staticmethod
    def of(name: str) -> Shape:
        config = json.loads((HERE / "models" / f"qwen3-{name}" / "config.json").read_text())
        hidden, size = config["hidden_size"], config["head_dim"]
        heads, kv = config["num_attention_heads"] * size, 2 * config["num_key_value_heads"] * size
        return Shape(
            config["num_hidden_layers"],
            hidden * (2 * heads + kv + 3 * config["intermediate_size"]),
            config["vocab_size"] * hidden,
            heads,
            kv,
        )


def roofline_ms(name: str, sequences: int, read_tb_s: float) -> float:
    """The floor of a decode step: weights and KV read once."""
    shape = Shape.of(name)
    weights = 2 * (shape.layers * shape.layer + shape.head)
    context = (PROMPT + DECODED / 2) * shape.layers * shape.kv * 2
    return (weights + sequences * context) / read_tb_s / 1e9


def prefill_tflop(name: str, sequences: int, length: int) -> float:
    """What prompts cost up to their first tokens: products, causal attention, a row of the head."""
    shape = Shape.of(name)
    attention = 4 * shape.heads * length * (length + 1) / 2
    products = 2 * shape.layer * length
    return sequences * (shape.layers * (products + attention) + 2 * shape.head) / 1e12


def start_to_first_token(name: str, cache: Path, checkpoint: Path | None = None) -> float:
    """Seconds until a new process, which starts an engine, has a token."""
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import offline;"
        "offline.Bench(sys.argv[2], *map(pathlib.Path, sys.argv[3:])).run([[1, 2, 3]], [1]);"
        "print('a token', flush=True)"
    )
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", code, str(HERE), name, *([str(checkpoint)] if checkpoint else [])],
        env={**os.environ, "ZLLM_KERNEL_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        came = any(line == "a token\n" for line in process.stdout)
        took = time.perf_counter() - start
    if not came or process.returncode:
        raise RuntimeError(f"the process ended with {process.returncode} and no token")
    return took


def start_from_page_cache(name: str, cache: Path) -> float:
    """The same from a checkpoint's files, which have just been written and so lie in memory."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder)
        write_checkpoint(HERE / "models" / f"qwen3-{name}", checkpoint, torch.device("cuda"))
        torch.cuda.empty_cache()
        return start_to_first_token(name, cache, checkpoint)


def measure(name: str, found: dict[str, Any], ceiling: dict[str, float], quick: bool) -> None:
    """Fill `found` with one model's row of the table, printing each figure as it comes."""
    bench = Bench(name)

    def note(key: str, value: float, extra: str = "") -> None:
        found[key] = round(value, 3)
        print(f"  {key:34s} {value:12,.3f}  {extra}", flush=True)

    def note_prefill(sequences: int, length: int, repeats: int) -> None:
        seconds = bench.prefill(sequences, length, repeats)
        rate = prefill_tflop(name, sequences, length) / seconds
        shares = [rate / ceiling[key] for key in ("bf16_tflop_s", "bf16_sustained_tflop_s")]
        note(
            f"prefill_{sequences}x{length}_ms",
            seconds * 1e3,
            f"{rate:.0f} TFLOP/s: {shares[0]:.0%} of the product, {shares[1]:.0%} of it sustained",
        )

    note("engine_start_s", bench.start_s)
    bench.run(_prompts(4, 64), [8] * 4)
    repeats = 1 if quick else 3
    # Before a second of load lowers the clock that a prompt alone has.
    note_prefill(1, 1024, 5 * repeats)
    for sequences in (1, 64, 256) if name == "0.6b" else (1, 64):
        step = bench.decode_step(sequences, repeats) * 1e3
        floor = roofline_ms(name, sequences, ceiling["read_tb_s"])
        note(f"decode_step_{sequences}_ms", step, f"roofline {floor:.3f} ({floor / step:.0%})")
    note_prefill(64, 1024, repeats)
    if name == "8b":
        note_prefill(1, 8192, repeats)
    prompts, outputs = mixed_load()
    tokens = sum(outputs)
    note("mixed_tok_s", statistics.median(tokens / bench.run(prompts, outputs) for _ in range(1)))
    problem = bench.engine.check()
    if problem:
        raise RuntimeError(problem)
    found["load"] = str(bench.engine.load())
    bench.engine.close()


def long_step(name: str, kv_cache_dtype: str) -> float:
    """Seconds of a decode step of 32 sequences with 16,384 tokens of context each. The prompts come
    from the prefix cache, which the first of three runs fills."""
    bench = Bench(name, enable_prefix_caching=True, kv_cache_dtype=kv_cache_dtype)
    prompts, times = _prompts(32, 16_384), {}
    for length in (1, 1, 65):
        times[length] = bench.run(prompts, [length] * 32)
    bench.engine.close()
    return (times[65] - times[1]) / 64


def draw_steps(name: str, path: Path) -> None:
    """Draw the decode step's time against the batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bench = Bench(name)
    sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    steps = [bench.decode_step(size, 1) * 1e3 for size in sizes]
    bench.engine.close()
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(sizes, steps, "o-")
    axes.set(xscale="log", xlabel="sequences", ylabel="decode step, ms", title=f"Qwen3-{name}")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["0.6b", "4b", "8b"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--start", type=Path, help="an empty folder: also measure start-up")
    parser.add_argument("--quick", action="store_true", help="one repeat of each figure")
    parser.add_argument(
        "--long", metavar="MODEL", help="also measure its steps at 32 x 16,384 by the cache's dtype"
    )
    options = parser.parse_args()
    ceiling = ceilings()
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(sys.argv),
        "ceilings": ceiling,
        "models": {},
    }
    print({key: round(value, 3) for key, value in ceiling.items()}, flush=True)
    for name in options.models:
        print(f"Qwen3-{name}", flush=True)
        found = report["models"].setdefault(name, {})
        if options.start:
            for kind in ("cold", "cached"):
                found[f"start_{kind}_s"] = round(start_to_first_token(name, options.start), 2)
                print(f"  start_{kind}_s {found[f'start_{kind}_s']}", flush=True)
        if options.start and name == options.models[-1]:
            found["start_page_cache_s"] = round(start_from_page_cache(name, options.start), 2)
            print(f"  start_page_cache_s {found['start_page_cache_s']}", flush=True)
        measure(name, found, ceiling, options.quick)
        if options.json:
            options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.long:
        steps = {kind: long_step(options.long, kind) * 1e3 for kind in ("auto", "fp8_e4m3")}
        steps["ratio"] = steps["fp8_e4m3"] / steps["auto"]
        report[f"decode_step_32x16384_ms_{options.long}"] = steps
        print(f"32 x 16,384 on Qwen3-{options.long}: {steps}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.plot:
        draw_steps(options.models[0], options.plot)


if __name__ == "__main__":
    main()
