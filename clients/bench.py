"""`zllm bench`: loads a server over gRPC and reports latencies as its clients see them.

Open loop (`--rate`): requests arrive as a Poisson process, whatever the server does, as long as
no more than `--concurrency` are open. Closed loop (`--concurrency` alone): each of N clients asks
again as soon as it has its answer.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from zllm.clients.aio import AsyncClient
from zllm.clients.credentials import Tls
from zllm.clients.results import ModelInfo
from zllm.errors import ConfigError, ZllmError

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Sample:
    """One request: seconds from its start to its first and last token."""

    ttft: float
    total: float
    tokens: int
    error: str = ""

    @property
    def tpot(self) -> float:
        """Seconds per output token after the first."""
        return (self.total - self.ttft) / max(self.tokens - 1, 1)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What to ask, and how fast."""

    target: str
    model: str = ""
    """Empty: the server's first."""
    num_requests: int = 200
    concurrency: int = 16
    """Requests open at once, at most."""
    rate: float | None = None
    """Requests a second. None: closed loop."""
    input_len: int = 128
    shared_len: int = 0
    """Of the prompt's tokens, those that all requests have in common."""
    output_len: int = 64
    seed: int = 0
    api_key: str = field(default="", repr=False)
    tls: Tls | None = None

    def __post_init__(self) -> None:
        for name in ("num_requests", "concurrency", "input_len", "output_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.shared_len < self.input_len:
            raise ConfigError(
                f"shared_len is {self.shared_len}: it must be in [0, {self.input_len}), "
                "a part of input_len"
            )
        if self.rate is not None and not self.rate > 0:
            raise ConfigError(f"rate is {self.rate}: it must be above 0, or left out")


def run(workload: Workload) -> dict[str, float | int | str]:
    """Counts, rates, and percentiles in milliseconds. Raises ZllmError where nothing answers."""
    return asyncio.run(_run(workload))


async def _run(workload: Workload) -> dict[str, float | int | str]:
    async with AsyncClient(
        workload.target, attempts=1, api_key=workload.api_key, tls=workload.tls
    ) as client:
        models = await client.models(timeout=30)
        chosen = [m for m in models if workload.model in ("", m.name)]
        if not chosen:
            raise ZllmError(f"{workload.model!r} is not served at {workload.target}")
        started = time.monotonic()
        samples = await _load(client, chosen[0], workload)
        return summarize(samples, time.monotonic() - started)


async def _load(client: AsyncClient, model: ModelInfo, workload: Workload) -> list[Sample]:
    rng = random.Random(workload.seed)
    shared = [rng.randrange(model.vocab_size) for _ in range(workload.shared_len)]
    gate = asyncio.Semaphore(workload.concurrency)

    async def one(prompt: list[int]) -> Sample:
        try:
            return await _measure(client, model.name, prompt, workload.output_len)
        finally:
            gate.release()

    tasks = []
    for _ in range(workload.num_requests):
        if workload.rate:
            await asyncio.sleep(rng.expovariate(workload.rate))
        await gate.acquire()
        own = workload.input_len - len(shared)
        prompt = shared + [rng.randrange(model.vocab_size) for _ in range(own)]
        tasks.append(asyncio.create_task(one(prompt)))
    return await asyncio.gather(*tasks)


async def _measure(client: AsyncClient, model: str, prompt: list[int], output_len: int) -> Sample:
    started = time.monotonic()
    first, tokens = 0.0, 0
    options: dict[str, Any] = {
        "model": model,
        "max_tokens": output_len,
        "ignore_eos": True,
        "temperature": 0.0,
    }
    try:
        async for delta in client.stream(prompt, **options):
            if not tokens:
                first = time.monotonic() - started
            tokens += delta.num_tokens
    except (ZllmError, TimeoutError) as error:
        return Sample(0.0, 0.0, 0, str(error))
    return Sample(first, time.monotonic() - started, tokens)


def summarize(samples: list[Sample], seconds: float) -> dict[str, float | int | str]:
    """Counts, rates and percentiles in milliseconds."""
    good = [sample for sample in samples if not sample.error]
    failed = [sample.error for sample in samples if sample.error]
    tokens = sum(sample.tokens for sample in good)
    report: dict[str, float | int | str] = {
        "requests": len(samples),
        "failed": len(failed),
        "seconds": seconds,
        "requests_per_s": len(good) / seconds,
        "output_tokens_per_s": tokens / seconds,
    }
    if failed:
        report["first_error"] = failed[0]
    if good:
        for name in ("ttft", "tpot", "total"):
            values = np.array([getattr(sample, name) for sample in good]) * 1e3
            for percentile in PERCENTILES:
                report[f"{name}_p{percentile}_ms"] = float(np.percentile(values, percentile))
    return report
