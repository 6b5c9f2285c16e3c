"""What the service adds and carries: latency over the bare engine, tokens and messages a second.

    python benchmarks/service.py [--pin] [--json FILE] [--plot FILE]

The server is the whole one (rate_service.py) over an engine that computes nothing, each in its own
process as ever. The reader (raw_reader.py) takes bytes off its sockets and looks at them
afterwards, so that the service is the slowest part. With --pin the service has the first core for
itself, and the engine and the reader the others.

- latency: at 20 ms a step; how late after the step's end in the engine a token is at the reader,
  and the jitter that is added to the time between a stream's tokens.
- merged: the engine is faster than the service, so that tokens merge.
- single: the engine makes 60,000 tokens a second; messages are what gets through.
- held: streams that are open at once, with a token every two seconds; the service's memory for
  each.
- model: as many streams with the embedded model's own engine, most of them in its queue.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil

HERE = Path(__file__).parent
RATE_SERVICE = str(HERE / "rate_service.py")
SERVE = (
    *("-m", "zllm", "serve", "--port", "0", "--admin-port", "0", "--metrics-port", "0"),
    *("--log-level", "warning", "--max-queued-requests", "20000"),
)
LATENCY_STREAMS = (1, 8, 64, 256)
RATE_STREAMS = (16, 64, 256, 1024)
KINDS = ("latency", "merged", "single", "held", "model")
SECONDS = 4.0
"""How long each load's engine makes tokens."""


@dataclass(frozen=True)
class Load:
    name: str
    streams: int
    tokens: int
    step_s: float


def loads(held: int) -> list[Load]:
    found = [Load("latency", streams, 250, 0.02) for streams in LATENCY_STREAMS]
    for name, rate in (("merged", 600_000), ("single", 60_000)):
        for streams in RATE_STREAMS:
            step_s = streams / rate
            found.append(Load(name, streams, int(SECONDS / step_s), step_s))
    return [*found, Load("held", held, 8, 2.0), Load("model", held, 4, 0.0)]


def measure(load: Load, *, pin: bool) -> dict[str, Any]:
    """One load against a fresh server."""
    cpus = sorted(os.sched_getaffinity(0))
    others = ",".join(map(str, cpus[1:])) if pin else ""
    with tempfile.TemporaryDirectory() as folder:
        times = f"{folder}/times"
        environment = os.environ | {
            "GRPC_ENABLE_FORK_SUPPORT": "0",
            "ZLLM_BENCH_STEP_S": str(load.step_s),
            "ZLLM_BENCH_TIMES": times,
            "ZLLM_BENCH_CPUS": others,
        }
        alone = ["taskset", "-c", str(cpus[0])] if pin else []
        server = subprocess.Popen(
            [*alone, sys.executable, *(SERVE if load.name == "model" else [RATE_SERVICE])],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            target = _target(server)
            process = psutil.Process(server.pid)
            before = process.cpu_times()
            memory = process.memory_info().rss
            reader = subprocess.Popen(
                [
                    *(["taskset", "-c", others] if pin else []),
                    *(sys.executable, HERE / "raw_reader.py", target),
                    *(str(load.streams), str(load.tokens)),
                    *([times] if load.name == "latency" else []),
                ],
                stdout=subprocess.PIPE,
            )
            most = memory
            while reader.poll() is None:
                most = max(most, process.memory_info().rss)
                time.sleep(0.05)
            after = process.cpu_times()
            found: dict[str, Any] = json.loads(reader.communicate()[0])
        finally:
            server.terminate()
            server.wait()
    spent = after.user + after.system - before.user - before.system
    return {
        "load": load.name,
        "streams": load.streams,
        **{key: found[key] for key in ("finished", "failed") if key in found},
        "tokens_per_s": found["tokens"] / found["seconds"],
        "messages_per_s": found["messages"] / found["seconds"],
        "cpu_us_per_message": spent / found["messages"] * 1e6,
        "kib_per_stream": (most - memory) / 1024 / load.streams,
        **{key: value for key, value in found.items() if key.endswith("_ms")},
    }


def _target(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None  # asked for with PIPE
    for line in server.stdout:
        if line.startswith("listening on "):
            return line.removeprefix("listening on ").strip()
    raise RuntimeError("the server ended before it listened; its output above says why")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for load, key, label in (
        ("merged", "tokens_per_s", "tokens, merged"),
        ("single", "messages_per_s", "messages"),
    ):
        chosen = [row for row in rows if row["load"] == load]
        left.plot(
            [row["streams"] for row in chosen], [row[key] for row in chosen], "o-", label=label
        )
    left.set(xscale="log", yscale="log", xlabel="streams", ylabel="a second", title="Carried")
    chosen = [row for row in rows if row["load"] == "latency"]
    for key in ("late_p50_ms", "late_p99_ms", "jitter_p50_ms", "jitter_p99_ms"):
        right.plot(
            [row["streams"] for row in chosen], [row[key] for row in chosen], "o-", label=key[:-3]
        )
    right.set(xscale="log", yscale="log", xlabel="streams", ylabel="ms", title="Added latency")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=10_000, help="to hold open at once")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--pin", action="store_true", help="the service alone on the first core")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    busy = os.getloadavg()
    rows = []
    for load in loads(options.streams):
        if load.name in options.only:
            row = measure(load, pin=options.pin)
            rows.append(row)
            words = (f"{k} {v:,.2f}" if isinstance(v, float) else f"{v}" for k, v in row.items())
            print("  ".join(words), flush=True)
    if options.json:
        report = {
            "date": time.strftime("%Y-%m-%d"),
            "command": " ".join(["python", *sys.argv]),
            "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}",
            "nice": os.nice(0),
            "load_average": busy,
            "python": platform.python_version(),
            "grpcio": grpc.__version__,
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
