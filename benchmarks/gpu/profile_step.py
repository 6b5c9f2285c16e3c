"""Where the time of decode steps and of prompts goes: kernels by time, and the gaps between them.

python benchmarks/gpu/profile_step.py 0.6b --sequences 64 --prompts 1x1024 64x1024 [--trace FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import offline
import torch
from torch.profiler import ProfilerActivity, profile

from zllm.runtime.engine import Engine
from zllm.runtime.messages import AddRequest, Sampling, Stopping

STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--prompts", nargs="*", default=[], help="COUNTxLENGTH")
    parser.add_argument("--trace", type=Path)
    options = parser.parse_args()
    bench = offline.Bench(options.model)
    print("\n".join(bench.engine.ready().startup_report))
    for sequences in options.sequences:
        for index in range(sequences):
            bench.engine.add(
                AddRequest(
                    request_id=10_000 + index,
                    prompt=np.random.randint(0, 10_000, 1024, dtype=np.int32).tobytes(),
                    sampling=Sampling(temperature=0.6, seed=index),
                    stopping=Stopping(max_tokens=400),
                )
            )
        for _ in range(100):
            bench.engine.step()
        # From one step's end to another's: a call waits for what the call before launched.
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(100):
            bench.engine.step()
        took, cpu = time.perf_counter() - start, time.process_time() - cpu
        print(f"{sequences} sequences: {took * 10:.3f} ms a step, host CPU {cpu * 10:.3f} ms")
        _host_work(bench.engine)
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
            for _ in range(STEPS):
                bench.engine.step()
            torch.cuda.synchronize()
        _report(profiler, STEPS)
        if options.trace:
            profiler.export_chrome_trace(str(options.trace))
        bench.engine.abort([10_000 + index for index in range(sequences)])
        while bench.engine.has_work():
            bench.engine.step()
    for prompts in options.prompts:
        count, length = map(int, prompts.split("x"))
        took = bench.prefill(count, length, 3)
        print(f"{prompts} prompts: {took * 1e3:.2f} ms to their first tokens")
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
            bench.prefill(count, length, 1)
            torch.cuda.synchronize()
        _report(profiler, 1)


def _host_work(engine: Engine) -> None:
    """Print the host's median microseconds a step and of its parts, with no wait counted."""
    runner: Any = engine.runner
    spent: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            begin = time.perf_counter()
            result = function(*arguments)
            spent.setdefault(name, []).append((time.perf_counter() - begin) * 1e6)
            return result

        return call

    parts = [(runner, "launch"), (runner, "collect"), (runner._graphs, "replay")]
    for owner, name in parts:
        setattr(owner, name, timed(name, getattr(owner, name)))
    step = timed("step", engine.step)
    for _ in range(50):
        torch.cuda.synchronize()
        step()
    for owner, name in parts:
        delattr(owner, name)
    whole = {name: statistics.median(times) * len(times) / 50 for name, times in spent.items()}
    print("  host, us a step: " + ", ".join(f"{name} {us:.0f}" for name, us in whole.items()))


def _report(profiler: profile, steps: int) -> None:
    kernels = sorted(
        (event for event in profiler.events() if event.device_type.name == "CUDA"),
        key=lambda event: event.time_range.start,
    )
    by_name: dict[str, list[float]] = {}
    busy, idle, end = 0.0, [], None
    for event in kernels:
        start, stop = event.time_range.start, event.time_range.end
        by_name.setdefault(event.name[:70], []).append(stop - start)
        if end is not None and start > end:
            idle.append(start - end)
        busy += max(stop - max(start, end or start), 0.0)
        end = max(stop, end or stop)
    if not kernels or end is None:
        print("  no kernel was traced")
        return
    span = end - kernels[0].time_range.start
    print(f"  device: {span / steps:.1f} us a step, busy {busy / span:.1%}")
    print(f"  longest gaps: {[round(gap, 1) for gap in sorted(idle, reverse=True)[:8]]} us")
    for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:14]:
        total = sum(times)
        each = total / len(times)
        print(f"  {total / steps:8.1f} us  {len(times) / steps:6.1f} x {each:7.2f}  {name}")


if __name__ == "__main__":
    main()
