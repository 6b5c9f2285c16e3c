"""What the service adds and carries: latency over the bare engine, tokens and messages a second.

    python benchmarks/service.py [--pin] [--frontends N] [--json FILE] [--plot FILE]

The server is the whole one (rate_service.py) over an engine that computes nothing, each in its own
process as ever. The reader (raw_reader.py) takes bytes off its sockets and looks at them
afterwards, so that the service is the slowest part. With --pin the service has the first core for
itself, and the engine and the reader the others.

- latency: at 20 ms a step; how late after the step's end in the engine a token is at the reader,
  and the jitter that is added to the time between a stream's tokens.
- merged: the engine is faster than the service, so that tokens merge.
- single: the engine makes 60,000 tokens a second; messages are what gets through.
- bare-latency, bare-single: gRPC alone, where the handlers do nothing but write the same bytes
  (bare_service.py), beside the row that it is to be compared with.
- held: streams that are open at once, with a token every two seconds; the service's memory for
  each, and how many the engine had at once.
- model: a tenth more streams with the embedded model's own engine, most of them in its queue.
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

from zllm.v1 import admin_pb2, admin_pb2_grpc

HERE = Path(__file__).parent
SERVE = (
    *("-m", "zllm", "serve", "--port", "0", "--admin-port", "0", "--metrics-port", "0"),
    *("--log-level", "warning", "--max-queued-requests", "20000"),
)
LATENCY_STREAMS = (1, 8, 64, 256)
RATE_STREAMS = (16, 64, 256, 1024)
BARE_STREAMS = 64
KINDS = ("latency", "merged", "single", "bare-latency", "bare-single", "held", "model")
SECONDS = 4.0
"""How long each load's engine makes tokens."""
STREAMS_A_CONNECTION = 100
CONNECTIONS_A_FRONTEND = 8
"""The kernel shares connections out by chance: with few, a frontend may get none."""
SAMPLE_S = 0.1


@dataclass(frozen=True)
class Load:
    name: str
    streams: int
    tokens: int
    step_s: float


def loads(held: int) -> list[Load]:
    found = []
    for streams in LATENCY_STREAMS:
        found.append(Load("latency", streams, 250, 0.02))
        if streams == BARE_STREAMS:
            found.append(Load("bare-latency", streams, 250, 0.02))
    for name, rate in (("merged", 600_000), ("single", 60_000)):
        for streams in RATE_STREAMS:
            step_s = streams / rate
            found.append(Load(name, streams, int(SECONDS / step_s), step_s))
            if name == "single" and streams == BARE_STREAMS:
                found.append(Load("bare-single", streams, int(SECONDS / step_s / 2), 0.0))
    # Of the model's, some have ended before the last has come.
    return [*found, Load("held", held, 16, 2.0), Load("model", held * 11 // 10, 32, 0.0)]


class Server:
    """A fresh one, of the kind that the load asks for, while it lives."""

    def __init__(self, load: Load, times: str, *, pin: bool, frontends: int) -> None:
        self.cpus = sorted(os.sched_getaffinity(0))
        environment = os.environ | {
            "GRPC_ENABLE_FORK_SUPPORT": "0",
            "ZLLM_BENCH_STEP_S": str(load.step_s),
            "ZLLM_BENCH_TIMES": times,
            "ZLLM_BENCH_CPUS": ",".join(map(str, self.cpus[1:])) if pin else "",
        }
        count = ["--frontends", str(frontends)]
        if load.name.startswith("bare-"):
            command = [str(HERE / "bare_service.py")]
        elif load.name == "model":
            command = [*SERVE, *count]
        else:
            command = [str(HERE / "rate_service.py"), *count]
        self._process = subprocess.Popen(
            [
                *(["taskset", "-c", str(self.cpus[0])] if pin else []),
                *(sys.executable, *command),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )

    def addresses(self) -> dict[str, str]:
        """Of "listening" and "admin", once it serves."""
        assert self._process.stdout is not None  # asked for with PIPE
        found: dict[str, str] = {}
        for line in self._process.stdout:
            name, _, address = line.strip().partition(" on ")
            found[name] = address
            if name == "listening":
                return found
        raise RuntimeError("the server ended before it listened; its output above says why")

    def processes(self) -> list[psutil.Process]:
        """Those that serve, without the engine."""
        parent = psutil.Process(self._process.pid)
        children = [p for p in parent.children() if "frontend_process" in " ".join(p.cmdline())]
        return [parent, *children]

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


def measure(load: Load, *, pin: bool, frontends: int = 1) -> dict[str, Any]:
    """One load against a fresh server."""
    with tempfile.TemporaryDirectory() as folder:
        times = f"{folder}/times"
        server = Server(load, times, pin=pin, frontends=frontends)
        try:
            addresses = server.addresses()
            processes = server.processes()
            before, memory = _cpu_seconds(processes), _memory(processes)
            others = ",".join(map(str, server.cpus[1:]))
            reader = subprocess.Popen(
                [
                    *(["taskset", "-c", others] if pin else []),
                    *(sys.executable, HERE / "raw_reader.py", addresses["listening"]),
                    *(str(load.streams), str(load.tokens), str(_connections(load, frontends))),
                    *([times] if load.name.endswith("latency") else []),
                ],
                stdout=subprocess.PIPE,
            )
            most, at_once = memory, 0
            while reader.poll() is None:
                most = max(most, _memory(processes))
                if load.name in ("held", "model"):
                    at_once = max(at_once, _in_the_engine(addresses["admin"]))
                time.sleep(SAMPLE_S)
            spent = _cpu_seconds(processes) - before
            found: dict[str, Any] = json.loads(reader.communicate()[0])
        finally:
            server.stop()
    return {
        "load": load.name,
        "streams": load.streams,
        **({"at_once": at_once} if at_once else {}),
        **{key: found[key] for key in ("finished", "failed") if key in found},
        "tokens_per_s": found["tokens"] / found["seconds"],
        "messages_per_s": found["messages"] / found["seconds"],
        "cpu_us_per_message": spent / found["messages"] * 1e6,
        "kib_per_stream": (most - memory) / 1024 / load.streams,
        **{key: value for key, value in found.items() if key.endswith("_ms")},
    }


def _connections(load: Load, frontends: int) -> int:
    enough = -(-load.streams // STREAMS_A_CONNECTION)
    return max(enough, CONNECTIONS_A_FRONTEND * frontends) if frontends > 1 else enough


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(time.user + time.system for time in times))


def _memory(processes: list[psutil.Process]) -> int:
    return sum(process.memory_info().rss for process in processes)


def _in_the_engine(admin: str) -> int:
    """Requests that it runs or that wait in its queue."""
    with grpc.insecure_channel(admin) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        (load,) = stub.GetLoad(admin_pb2.GetLoadRequest()).loads
        return int(load.running_requests + load.queued_requests)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for load, key, label in (
        ("merged", "tokens_per_s", "tokens, merged"),
        ("single", "messages_per_s", "messages"),
        ("bare-single", "messages_per_s", "messages, gRPC alone"),
    ):
        chosen = [row for row in rows if row["load"] == load]
        left.plot(
            [row["streams"] for row in chosen], [row[key] for row in chosen], "o-", label=label
        )
    bare = [row for row in rows if row["load"] == "bare-latency"]
    for row in bare:
        right.plot(row["streams"], row["late_p50_ms"], "k+", label="late p50, gRPC alone")
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
    parser.add_argument("--frontends", type=int, default=1, help="service processes")
    parser.add_argument("--pin", action="store_true", help="the service alone on the first core")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    busy = os.getloadavg()
    rows = []
    for load in loads(options.streams):
        if load.name in options.only:
            row = measure(load, pin=options.pin, frontends=options.frontends)
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
