"""Products with few rows of x: ours and cuBLAS's, each layer and a whole model's worth, in graphs.

    python benchmarks/kernels_linear.py --json benchmarks/results/linear-DATE.json

A layer is timed over as many different weights as make 400 MB, so that none stays in L2 by
accident; a model over its own layers, each with its own weight. The share is of the bandwidth that
reading 4 GB reaches in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.linear import SkinnyLinear

ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
_DISTINCT_BYTES = 400_000_000


@dataclass(frozen=True)
class Model:
    """The products of one decoder: [rows, columns] of each weight."""

    layers: int
    qkv: tuple[int, int]
    o: tuple[int, int]
    gate_up: tuple[int, int]
    down: tuple[int, int]
    head: tuple[int, int]

    def shapes(self) -> dict[str, tuple[int, int]]:
        return {name: getattr(self, name) for name in ("qkv", "o", "gate_up", "down", "head")}

    def bytes(self) -> int:
        one = sum(n * k for name, (n, k) in self.shapes().items() if name != "head")
        return 2 * (self.layers * one + self.head[0] * self.head[1])


MODELS = {
    "Qwen3-0.6B": Model(28, (4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024)),
    "Qwen3-4B": Model(36, (6144, 2560), (2560, 4096), (19456, 2560), (2560, 9728), (151936, 2560)),
    "Qwen3-8B": Model(36, (6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096)),
}


def time_graph(body: Callable[[], object], target_ms: float = 5.0) -> float:
    """Milliseconds of one replay of `body` captured in a graph: median of five runs."""
    body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()

    def run(times: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / times

    times = max(1, round(target_ms / run(2)))
    return median(run(times) for _ in range(5))


def write_result(path: Path | None, **measured: object) -> None:
    """What was measured, with date, GPU, versions and command; nothing without a path."""
    if path is None:
        return
    result = {
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "command": " ".join(["python", *sys.argv]),
        **measured,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def read_bandwidth(pool: Tensor) -> float:
    """Bytes a second of a reduction over 4 GB."""
    data = pool[:2_000_000_000].view(torch.float32)
    return data.nbytes / (time_graph(lambda: data.amax(), 20) / 1e3)


def layer_times(ours: SkinnyLinear, pool: Tensor, rate: float) -> list[dict[str, object]]:
    rows = []
    for model, shapes in ((name, model.shapes()) for name, model in MODELS.items()):
        for layer, (n, k) in shapes.items():
            count = max(2, min(pool.numel() // (n * k), _DISTINCT_BYTES // (2 * n * k)))
            weights = [pool[i * n * k : (i + 1) * n * k].view(n, k) for i in range(count)]
            for m in ROWS:
                x = torch.randn(m, k, device="cuda").bfloat16()
                out = torch.empty(m, n, dtype=x.dtype, device="cuda")
                mine = time_graph(lambda: [ours.linear(x, w, out) for w in weights])  # noqa: B023
                theirs = time_graph(lambda: [torch.mm(x, w.t(), out=out) for w in weights])  # noqa: B023
                share = 2 * n * k / (mine / count / 1e3) / rate
                rows.append(
                    {
                        "model": model,
                        "layer": layer,
                        "n": n,
                        "k": k,
                        "m": m,
                        "us": round(mine / count * 1e3, 2),
                        "cublas_us": round(theirs / count * 1e3, 2),
                        "share": round(share, 3),
                        "supported": ours.supports(m, n, k, x.dtype),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    return rows


def model_times(ours: SkinnyLinear, pool: Tensor, rate: float) -> list[dict[str, object]]:
    rows = []
    for name, model in MODELS.items():
        taken = 0
        sizes = model.shapes()

        def take(shape: tuple[int, int]) -> Tensor:
            nonlocal taken
            n, k = shape
            weight = pool[taken : taken + n * k].view(n, k)
            taken += n * k
            return weight

        layers = [
            [take(sizes[s]) for s in ("qkv", "o", "gate_up", "down")] for _ in range(model.layers)
        ]
        head = take(sizes["head"])
        hidden, heads, inner = sizes["qkv"][1], sizes["o"][1], sizes["down"][1]
        norm = torch.ones(hidden, dtype=pool.dtype, device="cuda")
        for m in ROWS:

            def empty(columns: int) -> Tensor:
                return torch.randn(m, columns, device="cuda").bfloat16()  # noqa: B023

            x, attended, activated = empty(hidden), empty(heads), empty(inner)
            qkv, gate_up, logits = empty(sizes["qkv"][0]), empty(2 * inner), empty(head.shape[0])

            def chain(linear: Callable[[Tensor, Tensor, Tensor], object]) -> None:
                for w_qkv, w_o, w_gate_up, w_down in layers:  # noqa: B023
                    linear(x, w_qkv, qkv)  # noqa: B023
                    linear(attended, w_o, x)  # noqa: B023
                    linear(x, w_gate_up, gate_up)  # noqa: B023
                    linear(activated, w_down, x)  # noqa: B023
                linear(x, head, logits)  # noqa: B023

            def cublas(x: Tensor, w: Tensor, out: Tensor) -> object:
                return torch.mm(x, w.t(), out=out)

            def chosen(x: Tensor, w: Tensor, out: Tensor) -> object:
                if ours.supports(x.shape[0], w.shape[0], w.shape[1], x.dtype):
                    return ours.linear(x, w, out)
                return cublas(x, w, out)

            def fused() -> None:
                before = norm if m <= 8 else None  # noqa: B023
                for w_qkv, w_o, w_gate_up, w_down in layers:  # noqa: B023
                    ours.linear(x, w_qkv, qkv, norm=before)  # noqa: B023
                    ours.linear(attended, w_o, x, residual=x)  # noqa: B023
                    ours.linear(x, w_gate_up, activated, norm=before, gated=True)  # noqa: B023
                    ours.linear(activated, w_down, x, residual=x)  # noqa: B023
                ours.linear(x, head, logits, norm=before)  # noqa: B023

            times = {
                "chosen_ms": time_graph(lambda: chain(chosen), 20),
                "cublas_ms": time_graph(lambda: chain(cublas), 20),
                "fused_ms": time_graph(fused, 20),
            }
            floor = model.bytes() / rate * 1e3
            rows.append(
                {"model": name, "m": m, "floor_ms": round(floor, 3)}
                | {key: round(value, 3) for key, value in times.items()}
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write all results")
    parser.add_argument("--models-only", action="store_true", help="skip the single layers")
    args = parser.parse_args()
    ours = SkinnyLinear(KernelLibrary())
    pool = torch.empty(7_600_000_000, dtype=torch.bfloat16, device="cuda")
    for part in pool.split(400_000_000):
        part.normal_(0, 0.02)
    rate = read_bandwidth(pool)
    print(f"reading: {rate / 1e12:.3f} TB/s", flush=True)
    models = model_times(ours, pool, rate)
    layers = [] if args.models_only else layer_times(ours, pool, rate)
    write_result(args.json, read_tb_s=round(rate / 1e12, 3), models=models, layers=layers)


if __name__ == "__main__":
    main()
