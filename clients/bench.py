"""`zllm bench`: loads a server over gRPC and reports latencies as its clients see them.

Open loop (`--rate`): requests arrive as a Poisson process, whatever the server does. Closed loop
(`--concurrency` alone): each of N clients asks again as soon as it has its answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from zllm.clients.aio import AsyncClient
from zllm.clients.results import ModelInfo
from zllm.errors import ZllmError

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", default="127.0.0.1:50051")
    parser.add_argument("--model", default="", help="default: the server's first")
    parser.add_argument("--num-requests", type=int, default=200)
    parser.add_argument(
        "--concurrency", type=int, default=16, help="requests open at once, at most"
    )
    parser.add_argument(
        "--rate", type=float, help="requests a second, Poisson; default: closed loop"
    )
    parser.add_argument("--input-len", type=int, default=128, help="random prompt tokens")
    parser.add_argument("--shared-len", type=int, default=0, help="of them, common to all requests")
    parser.add_argument("--output-len", type=int, default=64, help="tokens of every answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def main(arguments: argparse.Namespace) -> int:
    report = asyncio.run(_run(arguments))
    if arguments.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name:24} {value:,.3f}" if isinstance(value, float) else f"{name:24} {value}")
    return 1 if report["failed"] else 0


async def _run(arguments: argparse.Namespace) -> dict[str, float | int | str]:
    async with AsyncClient(arguments.target, attempts=1) as client:
        models = await client.models(timeout=30)
        chosen = [m for m in models if arguments.model in ("", m.name)]
        if not chosen:
            raise ZllmError(f"{arguments.model!r} is not served at {arguments.target}")
        started = time.monotonic()
        samples = await _load(client, chosen[0], arguments)
        return summarize(samples, time.monotonic() - started)


async def _load(
    client: AsyncClient, model: ModelInfo, arguments: argparse.Namespace
) -> list[Sample]:
    rng = random.Random(arguments.seed)
    shared = [rng.randrange(model.vocab_size) for _ in range(arguments.shared_len)]
    gate = asyncio.Semaphore(arguments.concurrency)

    async def one(prompt: list[int]) -> Sample:
        try:
            return await _measure(client, model.name, prompt, arguments.output_len)
        finally:
            gate.release()

    tasks = []
    for _ in range(arguments.num_requests):
        if arguments.rate:
            await asyncio.sleep(rng.expovariate(arguments.rate))
        await gate.acquire()
        own = arguments.input_len - len(shared)
        prompt = shared + [rng.randrange(model.vocab_size) for _ in range(max(own, 1))]
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
