"""What the service adds and carries: latency over the bare engine, tokens and messages a second.

    python benchmarks/service.py [--json FILE]

The engine is one that computes nothing (rate_engine.py), in its own process as ever; the service
runs in this process, the readers in a third. A reader takes raw messages off the wire and decodes
nothing, so that the service is the slowest part.

- latency: 64 streams at 20 ms a step; how long after the engine's step a token reaches the reader,
  by the gaps between messages (their deviation from the step) and by the first token.
- messages: as many tokens as come through when the engine makes more than the service can send one
  by one; a busy stream's tokens merge, so that tokens and messages are counted apart.
- held: streams that are open at once, and the service's memory for each.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import psutil
import uvloop

from zllm.runtime.config import EngineConfig
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.service.config import ServerConfig
from zllm.service.server import Server
from zllm.service.supervisor import EngineProcess
from zllm.v1 import generation_pb2

METHOD = "/zllm.v1.GenerationService/StreamGenerate"
HERE = Path(__file__).parent


async def _read(target: str, streams: int, tokens: int) -> dict[str, Any]:
    """Open `streams` at once and read them to their ends."""
    request = generation_pb2.GenerateRequest(text="a")
    request.stopping.max_tokens = tokens
    request.stopping.ignore_eos = True
    wire = request.SerializeToString()
    arrivals: list[list[float]] = [[] for _ in range(streams)]
    # One HTTP/2 connection carries a hundred streams by default; several share the load.
    channels = [
        grpc.aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(max(1, streams // 100))
    ]
    calls = [channel.unary_stream(METHOD) for channel in channels]

    async def one(index: int) -> float:
        sent = time.perf_counter()
        times = arrivals[index]
        async for _ in calls[index % len(calls)](wire):
            times.append(time.perf_counter())
        return times[0] - sent

    started = time.perf_counter()
    firsts = await asyncio.gather(*(one(index) for index in range(streams)))
    took = time.perf_counter() - started
    for channel in channels:
        await channel.close()
    gaps = [b - a for times in arrivals for a, b in itertools.pairwise(times[1:-1])]
    return {
        "seconds": took,
        "messages": sum(len(times) for times in arrivals),
        "firsts": sorted(firsts),
        "gaps": sorted(gaps),
    }


def _reader(target: str, streams: int, tokens: int, answers: Any) -> None:
    answers.put(uvloop.run(_read(target, streams, tokens)))


async def _serve(step_s: float, streams: int, tokens: int) -> dict[str, Any]:
    """One load against a fresh service and engine; what the reader found, and our memory."""
    os.environ["ZLLM_BENCH_STEP_S"] = str(step_s)
    engine = EngineProcess(
        EngineConfig(model=EMBEDDED_MODEL),
        timeout=60.0,
        command=(sys.executable, str(HERE / "rate_engine.py")),
    )
    ready = await engine.start()
    server = Server(ServerConfig(port=0, admin_port=0))
    await server.start()
    await server.expect("rate", EMBEDDED_MODEL)
    server.add("rate", ready, engine.client)
    process = psutil.Process()
    before, cpu = process.memory_info().rss, process.cpu_times()
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    reader = spawn.Process(
        target=_reader, args=(f"127.0.0.1:{server.port}", streams, tokens, answers)
    )
    reader.start()
    most = before
    while reader.is_alive() and answers.empty():
        most = max(most, process.memory_info().rss)
        await asyncio.sleep(0.05)
    found: dict[str, Any] = await asyncio.to_thread(answers.get)
    await asyncio.to_thread(reader.join)
    spent = process.cpu_times()
    found["cpu_s"] = spent.user + spent.system - cpu.user - cpu.system
    found["rss_growth_mib"] = (most - before) / 2**20
    await server.stop(0.0)
    await engine.stop()
    return found


def _at(values: list[float], share: float) -> float:
    return values[min(int(share * len(values)), len(values) - 1)]


def latency() -> dict[str, float]:
    step = 0.02
    found = uvloop.run(_serve(step, 64, 200))
    late = sorted(abs(gap - step) for gap in found["gaps"])
    return {
        "latency_jitter_p50_ms": _at(late, 0.5) * 1e3,
        "latency_jitter_p99_ms": _at(late, 0.99) * 1e3,
        "latency_first_token_p50_ms": _at(found["firsts"], 0.5) * 1e3,
    }


def throughput() -> dict[str, float]:
    rates = {}
    for name, streams, tokens, step in (
        ("few_streams", 64, 20_000, 0.000_15),
        ("many_streams", 512, 4_000, 0.001),
    ):
        found = uvloop.run(_serve(step, streams, tokens))
        rates[f"{name}_tokens_per_s"] = streams * tokens / found["seconds"]
        rates[f"{name}_messages_per_s"] = found["messages"] / found["seconds"]
        rates[f"{name}_service_cpu_share"] = found["cpu_s"] / found["seconds"]
    return rates


def held(streams: int) -> dict[str, float]:
    """Many streams with a token every two seconds."""
    found = uvloop.run(_serve(2.0, streams, 5))
    return {
        "held_streams": streams,
        "held_kib_each": found["rss_growth_mib"] * 1024 / streams,
        "held_median_gap_s": statistics.median(found["gaps"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=2000, help="to hold open at once")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, float] = {}
    for part in (latency, throughput, lambda: held(options.streams)):
        found = part()
        report.update(found)
        for name, value in found.items():
            print(f"{name:34s} {value:14,.3f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
