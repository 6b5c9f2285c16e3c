"""What an engine counts of its steps: cheap to note each step, read twice a second."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from zllm.runtime.messages import Histogram

STEP_SECONDS = (
    0.0005, 0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04,
    0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 40.0,
)  # fmt: skip
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Tally:
    """Values counted by bucket; `bounds` ascend, and a value belongs to the first that is not
    below it."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def histogram(self) -> Histogram:
        return Histogram(self._bounds, tuple(self._counts), self._sum)


class StepTally:
    """The length of an engine's steps, in seconds and in tokens.

    A step is launched while the one before it runs: its own time begins when that one was
    committed, or with its launch if nothing ran.
    """

    def __init__(self) -> None:
        self._seconds = Tally(STEP_SECONDS)
        self._tokens = Tally(STEP_TOKENS)
        self._committed = 0.0

    def add(self, launched: float, committed: float, num_tokens: int) -> None:
        self._seconds.add(committed - max(launched, self._committed))
        self._tokens.add(num_tokens)
        self._committed = committed

    def histograms(self) -> tuple[Histogram, Histogram]:
        """Seconds, tokens."""
        return self._seconds.histogram(), self._tokens.histogram()
