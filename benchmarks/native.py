"""Measures the native core: what a step costs the host, and what the cache's operations cost.

    python benchmarks/native.py [--json FILE]

Each number is the median of several runs of a loop. The last column is the bar of the project.
The yardstick (benchmarks/nano_loop.py) does the same decode steps in plain Python, in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from nano_loop import Loop

from zllm.native.prefix_cache import PrefixCache
from zllm.native.scheduler import Scheduler
from zllm.native.step_objects import Plan

REPEATS = 9
BLOCK = 16


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    size: int
    value: float
    unit: str
    bar: float | None = None
    at_least: bool = False

    @property
    def passed(self) -> bool:
        if self.bar is None:
            return True
        return self.value >= self.bar if self.at_least else self.value <= self.bar


def seconds(run: Callable[[], object], prepare: Callable[[], object] | None = None) -> float:
    """Median wall time of `run`, prepared afresh each time."""
    times = []
    for _ in range(REPEATS):
        if prepare is not None:
            prepare()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def step_cost(num_seqs: int, prompt_len: int = 64, steps: int = 160) -> float:
    """Seconds of plan + pack + commit while all sequences decode, one step ahead."""
    tokens_each = prompt_len + (REPEATS + 1) * steps + 64
    scheduler = Scheduler(
        num_blocks=num_seqs * (tokens_each // BLOCK + 2),
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max(8192, num_seqs * 2),
        max_model_len=tokens_each + BLOCK,
    )
    rng = np.random.default_rng(0)
    for i in range(num_seqs):
        scheduler.add(
            i,
            rng.integers(1, 1000, prompt_len, dtype=np.int32),
            now=0.0,
            max_tokens=tokens_each,
            eos_token_ids=(0,),
        )
    arenas = [np.zeros(scheduler.arena_words, np.int32) for _ in range(2)]
    tokens = rng.integers(1, 1000, num_seqs, dtype=np.int32)

    def planned(arena: int) -> Plan:
        plan = scheduler.plan(0.0, arenas[arena])
        assert plan is not None, "there is always work"
        return plan

    plan = planned(0)
    while scheduler.stats()["waiting"]:
        scheduler.commit(plan, tokens, 0.0)
        plan = planned(0)

    def run() -> None:
        nonlocal plan
        for turn in range(steps):
            following = planned(turn & 1)
            scheduler.commit(plan, tokens, 0.0)
            plan = following

    run()
    assert plan.num_decodes == num_seqs
    return seconds(run) / steps


def yardstick_cost(num_seqs: int, prompt_len: int = 64, steps: int = 32) -> float:
    """Seconds of a step in plain Python."""
    repeats = REPEATS + 1
    blocks = num_seqs * ((prompt_len + repeats * steps) // BLOCK + 2)
    loop = Loop(num_seqs, prompt_len, blocks, max_tokens=1 << 30)
    tokens = np.random.default_rng(0).integers(1, 1000, num_seqs).tolist()

    def run() -> None:
        for _ in range(steps):
            loop.step(tokens)

    return seconds(run) / steps


def match_cost(num_tokens: int) -> float:
    """Seconds to match a cached prefix among ten thousand others."""
    cache = PrefixCache(num_tokens // BLOCK + 10002)
    rng = np.random.default_rng(0)
    for _ in range(10000):
        cache.insert(rng.integers(0, 150000, BLOCK, dtype=np.int32))
    tokens = rng.integers(0, 150000, num_tokens, dtype=np.int32)
    cache.insert(tokens)
    assert cache.match(tokens) == num_tokens
    loops = max(1, 400000 // num_tokens)

    def run() -> None:
        match = cache.match
        for _ in range(loops):
            match(tokens)

    return seconds(run) / loops


def insert_cost(num_tokens: int) -> float:
    """Seconds to insert new tokens, blocks taken and released included."""
    count = max(4, 65536 // num_tokens)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 150000, num_tokens, dtype=np.int32) for _ in range(count)]
    cache = PrefixCache(2)

    def prepare() -> None:
        nonlocal cache
        cache = PrefixCache(count * num_tokens // BLOCK + 1)
        cache.insert(np.arange(BLOCK, dtype=np.int32))

    def run() -> None:
        for prompt in prompts:
            cache.insert(prompt)

    return seconds(run, prepare) / count


def evict_cost(num_leaves: int) -> float:
    """Seconds to evict one of so many leaves."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 150000, (num_leaves, BLOCK), dtype=np.int32)
    count = num_leaves // 10
    cache = PrefixCache(2)

    def prepare() -> None:
        nonlocal cache
        cache = PrefixCache(num_leaves + 1)
        for prompt in prompts:
            cache.insert(prompt)
        assert cache.num_empty == 0

    return seconds(lambda: cache.take(count), prepare) / count


def take_free_cost(num_blocks: int) -> float:
    """Seconds to take a block and free it again."""
    cache = PrefixCache(num_blocks + 1)
    loops = max(1, 100000 // num_blocks)

    def run() -> None:
        for _ in range(loops):
            cache.release(cache.take(num_blocks))

    return seconds(run) / (loops * num_blocks)


def measure() -> list[Row]:
    rows = []
    step_bars = {16: 15.0, 256: 60.0, 4096: 1000.0}
    for size in (1, 16, 64, 256, 1024, 4096):
        ours = step_cost(size) * 1e6
        rows.append(Row("plan + pack + commit, decodes", size, ours, "us", step_bars.get(size)))
        theirs = yardstick_cost(size) * 1e6
        rows.append(Row("  the same in plain Python", size, theirs, "us"))
        bar = 9.0 if size == 256 else None
        rows.append(Row("  times slower", size, theirs / ours, "x", bar, at_least=True))
    match_bars = {1024: 2.0, 32768: 60.0}
    for size in (16, 256, 1024, 8192, 32768, 131072):
        value = match_cost(size) * 1e6
        rows.append(Row("match, tokens", size, value, "us", match_bars.get(size)))
    for size in (16, 256, 1024, 8192, 32768):
        value = insert_cost(size) * 1e6
        rows.append(Row("insert, new tokens", size, value, "us", {1024: 10.0}.get(size)))
    for size in (1000, 10000, 100000):
        value = evict_cost(size) * 1e9
        rows.append(Row("evict, of leaves", size, value, "ns", {100000: 1000.0}.get(size)))
    for size in (100, 10000, 100000):
        value = take_free_cost(size) * 1e9
        rows.append(Row("take + free, blocks", size, value, "ns", 60.0))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows = measure()
    print(f"{'':34}{'size':>8}{'value':>12}      bar")
    for row in rows:
        bar = ""
        if row.bar is not None:
            sign = ">=" if row.at_least else "<="
            bar = f"{sign} {row.bar:g} {'ok' if row.passed else 'MISSED'}"
        print(f"{row.name:34}{row.size:>8}{row.value:>12.2f} {row.unit:4} {bar}")
    if options.json:
        report = {"repeats": REPEATS, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
