"""CUDA graphs of a step: a body by padded token count, a head by padded sample count, and of few
sequences that decode both as one.

The body runs from the arena to the hidden states of the sampled tokens, the head from those to
sampled tokens. No graph knows anything of a step but its padded sizes: the real ones are read from
the arena on the device. All graphs share one memory pool, since only one runs at a time.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from zllm.cuda.graph import GraphLaunch

SHORT_STEP = 64
"""Sequences of the longest decode step that is one graph with its head. Longer ones would hide what
that saves, and each graph takes memory."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """The sizes that graphs are captured at, ascending."""

    decode: tuple[int, ...]
    """Sequences of a pure decode step; also the samples of any step."""
    mixed: tuple[int, ...]
    """Tokens of a step with prefill chunks."""


def choose_buckets(max_num_seqs: int, max_num_batched_tokens: int) -> Buckets:
    """Few enough to capture, up to where launches no longer matter: sequences pad to a multiple of
    8 up to 64, of 16 up to 256 and of 32; tokens of 64 up to 256, of 128 up to 1,024 and of 256."""
    decode = {1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, max_num_seqs, 32)}
    mixed = {64, 128, 192, *range(256, 1024, 128), *range(1024, 2049, 256)}
    top = min(max_num_seqs, max_num_batched_tokens)
    return Buckets(
        decode=(*sorted(size for size in decode if size < top), top),
        mixed=tuple(sorted(size for size in mixed if size <= max_num_batched_tokens)),
    )


def bucket_of(size: int, buckets: tuple[int, ...]) -> int | None:
    """The smallest bucket that holds `size`; None where all are smaller."""
    index = bisect_left(buckets, size)
    return buckets[index] if index < len(buckets) else None


@contextmanager
def no_garbage() -> Iterator[None]:
    """Garbage that dies inside a capture frees memory of the device, which invalidates it."""
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class StepGraphs:
    """Captured bodies and heads. The functions must only launch work on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[str, int], GraphLaunch] = {}

    def capture(
        self,
        kind: str,
        sizes: tuple[int, ...],
        run: Callable[[int], object],
        progress: Callable[[], None],
    ) -> None:
        """Capture `run(size)` for each size, largest first, so that the pool grows once.
        `progress` is called after each. To be called where there is no garbage."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for size in reversed(sizes):
                # Kernels load and libraries choose algorithms before the capture, not in it.
                run(size)
                graph = torch.cuda.CUDAGraph()
                # Not torch.cuda.graph(): its garbage collection would take most of the time.
                graph.capture_begin(pool=self._pool)
                try:
                    run(size)
                finally:
                    graph.capture_end()
                self._graphs[kind, size] = GraphLaunch(graph, stream.device_index)
                progress()
        torch.cuda.current_stream(self._device).wait_stream(stream)

    def replay(self, kind: str, size: int) -> None:
        self._graphs[kind, size]()

    def __len__(self) -> int:
        return len(self._graphs)
