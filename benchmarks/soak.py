"""A soak: random load with cancels against the embedded model, for as long as asked.

    python benchmarks/soak.py [--minutes 20] [--device cuda] [--out benchmarks/results/soak-DATE]

The service runs in this process, so that its tasks can be counted; the engine in its own as ever,
the load (soak_load.py) in a third. Memory, file descriptors, free blocks and tasks are sampled
throughout and must be flat: no growth from the second quarter to the last beyond SLACK, and once
the load has ended every block, task and descriptor is back. Writes OUT.json and OUT.png; exits
with 1 where something was not flat.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import re
import signal
import statistics
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import grpc
import matplotlib
import psutil
import uvloop
from matplotlib import pyplot

import zllm
from zllm.runtime.config import EngineConfig
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.service.config import ServerConfig
from zllm.service.serve import serve
from zllm.v1 import admin_pb2, admin_pb2_grpc

SAMPLE_S = 2.0
WARM_UP_S = 10.0
SLACK = {"service_rss_mib": 0.03, "engine_rss_mib": 0.03}
"""Of the level: what the last quarter's mean may exceed the second's by."""
SLACK |= {"service_fds": 0.15, "engine_fds": 0.15, "tasks": 0.15}
"""They follow the number of calls, which is random; a leak of them shows at rest."""
LOAD = Path(__file__).with_name("soak_load.py")


@dataclass(frozen=True)
class Sample:
    seconds: float
    service_rss_mib: float
    engine_rss_mib: float
    service_fds: int
    engine_fds: int
    tasks: int
    blocks_free: int
    preemptions: float
    running: int
    queued: int
    tokens_per_s: float


class Sampler:
    def __init__(self, admin: admin_pb2_grpc.AdminServiceStub, metrics_url: str) -> None:
        self._admin = admin
        self._metrics_url = metrics_url
        self._began = time.monotonic()
        self._service = psutil.Process()

    async def take(self) -> Sample:
        """Reads the metrics, too, as Prometheus does all the time."""
        page = await asyncio.to_thread(_read, self._metrics_url)
        (preemptions,) = re.findall(r"^zllm:num_preemptions_total\{.*\} (\S+)", page, re.M)
        (load,) = (await self._admin.GetLoad(admin_pb2.GetLoadRequest())).loads
        (engine,) = [c for c in self._service.children() if "engine.sock" in " ".join(c.cmdline())]
        return Sample(
            seconds=time.monotonic() - self._began,
            service_rss_mib=self._service.memory_info().rss / 2**20,
            engine_rss_mib=engine.memory_info().rss / 2**20,
            service_fds=self._service.num_fds(),
            engine_fds=engine.num_fds(),
            tasks=len(asyncio.all_tasks()),
            blocks_free=load.kv_blocks_free,
            preemptions=float(preemptions),
            running=load.running_requests,
            queued=load.queued_requests,
            tokens_per_s=load.tokens_per_second,
        )

    async def at_rest(self) -> Sample:
        """Once nothing runs any more and every channel of the load is closed: the least of ten
        looks, as a periodic task or two is now here and now not."""
        samples = []
        for _ in range(10):
            await asyncio.sleep(1)
            gc.collect()
            samples.append(await self.take())
        return min(samples, key=lambda s: (s.running + s.queued, s.tasks, s.service_fds))


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


async def put_under_load(target: str, seconds: float, seed: int) -> dict[str, int]:
    command = [sys.executable, str(LOAD), target, str(seconds), str(seed)]
    load = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await load.communicate()
    ends: dict[str, int] = json.loads(out)
    return ends


async def soak(minutes: float, device: Literal["cpu", "cuda"]) -> dict[str, Any]:
    lines: list[str] = []
    # So few blocks that requests give theirs up, by recomputation and by swap.
    engine = EngineConfig(
        model=EMBEDDED_MODEL, served_model_name="tiny", num_kv_blocks=384, max_num_seqs=32,
        swap_space_gib=0.01, device=device,
    )  # fmt: skip
    config = ServerConfig(port=0, admin_port=0, metrics_port=0)
    server = asyncio.create_task(
        serve(config, [engine], engine, version=zllm.__version__, say=lines.append)
    )
    while not any(line.startswith("listening on ") for line in lines):
        if server.done():
            server.result()
        await asyncio.sleep(0.1)
    addresses = {line.split()[0]: line.split()[-1] for line in lines if " on " in line}
    async with grpc.aio.insecure_channel(addresses["admin"]) as channel:
        sampler = Sampler(admin_pb2_grpc.AdminServiceStub(channel), addresses["metrics"])
        # What is allocated once is there before the first count.
        await put_under_load(addresses["listening"], WARM_UP_S, seed=0)
        before = await sampler.at_rest()
        load = asyncio.create_task(put_under_load(addresses["listening"], minutes * 60, seed=1))
        samples = []
        while not load.done():
            samples.append(await sampler.take())
            await asyncio.wait({load}, timeout=SAMPLE_S)
        after = await sampler.at_rest()
    os.kill(os.getpid(), signal.SIGTERM)
    exit_code = await server
    return {
        "calls": load.result(),
        "before": asdict(before),
        "after": asdict(after),
        "exit_code": exit_code,
        "not_flat": not_flat(before, after, samples),
        "samples": {f.name: [getattr(s, f.name) for s in samples] for f in fields(Sample)},
    }


def not_flat(before: Sample, after: Sample, samples: list[Sample]) -> list[str]:
    """What grew, or did not come back; empty: all is flat."""
    quarter = len(samples) // 4
    found = []
    for name, slack in SLACK.items():
        values = [float(getattr(sample, name)) for sample in samples]
        early = statistics.fmean(values[quarter : 2 * quarter])
        late = statistics.fmean(values[-quarter:])
        if late > early * (1 + slack):
            found.append(f"{name} grew from {early:.1f} to {late:.1f}")
    for name in ("service_fds", "engine_fds", "tasks", "blocks_free", "running", "queued"):
        was, became = getattr(before, name), getattr(after, name)
        if (became < was) if name == "blocks_free" else (became > was):
            found.append(f"{name} was {was} before the load and is {became} after it")
    return found


def plot(report: dict[str, Any], path: Path) -> None:
    matplotlib.use("Agg")
    samples = report["samples"]
    minutes = [seconds / 60 for seconds in samples["seconds"]]
    figure, panels = pyplot.subplots(4, 1, figsize=(9, 9), sharex=True)
    lines = [
        ("memory, MiB", ["service_rss_mib", "engine_rss_mib"]),
        ("file descriptors", ["service_fds", "engine_fds"]),
        ("asyncio tasks, requests", ["tasks", "running", "queued"]),
        ("free KV blocks", ["blocks_free"]),
    ]
    for panel, (label, names) in zip(panels, lines, strict=True):
        for name in names:
            panel.plot(minutes, samples[name], label=name.replace("_", " "), linewidth=0.8)
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.legend(loc="lower right", fontsize="small")
    calls = sum(report["calls"].values())
    panels[0].set_title(f"{calls:,} calls in {minutes[-1]:.0f} minutes, {report['date']}")
    panels[-1].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    # gRPC's fork handlers only warn: what is started here as a child execs at once.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="the path of both files, without its ending")
    options = parser.parse_args()
    date = time.strftime("%Y-%m-%d")
    report = {
        "date": date,
        "machine": f"{os.cpu_count()} cores of {platform.machine()}, shared by all",
        "versions": {"zllm": zllm.__version__, "grpcio": grpc.__version__},
        "command": f"python benchmarks/soak.py --minutes {options.minutes:g} "
        f"--device {options.device}",
    }
    report |= uvloop.run(soak(options.minutes, options.device))
    print(json.dumps({k: v for k, v in report.items() if k != "samples"}, indent=2))
    if options.out is not None:
        options.out.with_suffix(".json").write_text(json.dumps(report) + "\n")
        plot(report, options.out.with_suffix(".png"))
    return 1 if report["not_flat"] else 0


if __name__ == "__main__":
    sys.exit(main())
