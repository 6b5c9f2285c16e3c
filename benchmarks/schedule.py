"""Simulates the scheduler without a model, and draws what each policy does to a load.

    python benchmarks/schedule.py [--out benchmarks/results]

Steps take the time of a linear model (`StepTime`), planned one ahead as in the engine. For each
load: percentiles of TTFT (time to first token) and TPOT (time per output token), hit rate of the
prefix cache, fairness among tenants, preemptions.
"""

from __future__ import annotations

import argparse
import heapq
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from traces import Tokens, Turn, bursty, make, poisson

from zllm.native.scheduler import Scheduler
from zllm.native.step_objects import Events, Plan

POLICIES = ("fcfs", "priority", "sjf", "lpm", "fair")
MAX_MODEL_LEN = 131072


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: reading the weights and launching, then so much a token."""

    base: float = 4e-3
    per_token: float = 30e-6

    def of(self, num_tokens: int) -> float:
        return self.base + self.per_token * num_tokens


@dataclass
class Record:
    """What a request went through."""

    turn: Turn
    arrived: float
    prompt: Tokens
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    cached: int = 0

    @property
    def ttft(self) -> float:
        return self.times[0] - self.arrived

    @property
    def tpot(self) -> float:
        return (self.times[-1] - self.times[0]) / max(1, len(self.times) - 1)


class Simulation:
    """One load under one policy."""

    def __init__(self, policy: str, *, num_blocks: int = 4000, max_num_seqs: int = 96) -> None:
        self.scheduler = Scheduler(
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=2048,
            max_model_len=MAX_MODEL_LEN,
            policy=policy,
        )
        self.step_time = StepTime()
        self.arenas = [np.zeros(self.scheduler.arena_words, np.int32) for _ in range(2)]
        self.records: list[Record] = []
        self.arrivals: list[tuple[float, int, Turn, Tokens]] = []
        self.rng = np.random.default_rng(1)
        self.now = 0.0

    def arrive(self, at: float, turn: Turn, history: Tokens) -> None:
        """Let a turn come at a time, after what was said before it."""
        prompt = np.concatenate([history, turn.prompt])
        heapq.heappush(self.arrivals, (at, len(self.arrivals) + len(self.records), turn, prompt))

    def run(self) -> None:
        """Until everybody is served."""
        in_flight: deque[tuple[Plan, float]] = deque()
        device_free = 0.0
        while self.arrivals or self.scheduler.has_work():
            self.admit_arrivals()
            plan = self.scheduler.plan(self.now, self.arenas[len(self.records) & 1])
            if plan is not None:
                device_free = max(self.now, device_free) + self.step_time.of(plan.num_tokens)
                in_flight.append((plan, device_free))
            if in_flight and (plan is None or len(in_flight) == 2):
                oldest, done = in_flight.popleft()
                self.now = max(self.now, done)
                tokens = self.rng.integers(1, 100000, oldest.num_rows, dtype=np.int32)
                self.note(self.scheduler.commit(oldest, tokens, self.now))
            elif plan is None and self.arrivals:
                self.now = max(self.now, self.arrivals[0][0])

    def admit_arrivals(self) -> None:
        while self.arrivals and self.arrivals[0][0] <= self.now:
            at, _, turn, prompt = heapq.heappop(self.arrivals)
            self.scheduler.add(
                len(self.records),
                prompt,
                now=at,
                max_tokens=turn.max_tokens,
                tenant=turn.tenant,
                priority=1 if turn.kind == "chat" else 0,
            )
            self.records.append(Record(turn, at, prompt))

    def note(self, events: Events) -> None:
        for request_id, cached, *_ in events.started:
            self.records[request_id].cached = cached
        for request_id, token, finish in zip(
            events.request_ids.tolist(),
            events.tokens.tolist(),
            events.finishes.tolist(),
            strict=True,
        ):
            record = self.records[request_id]
            record.tokens.append(token)
            record.times.append(self.now)
            if finish and record.turn.later:
                following, *rest = record.turn.later
                following.later = rest
                history = np.concatenate([record.prompt, np.array(record.tokens, np.int32)])
                self.arrive(self.now + following.arrival, following, history)


def fairness(records: list[Record], until: float) -> float:
    """Jain's index of the tokens computed by then for tenants that wanted more: 1 is equal."""
    waiting: set[str] = set()
    served: dict[str, int] = {}
    for record in records:
        if record.arrived > until:
            continue
        tenant = record.turn.tenant
        tokens = sum(time <= until for time in record.times)
        computed = len(record.prompt) - record.cached + tokens if tokens else 0
        served[tenant] = served.get(tenant, 0) + computed
        if record.times[0] > until:
            waiting.add(tenant)
    shares = np.array([served[tenant] for tenant in sorted(waiting)] or [1])
    return float(shares.sum() ** 2 / (len(shares) * (shares**2).sum()))


def measure(policy: str, turns: list[Turn], until: float) -> dict[str, float]:
    """One policy's numbers for a load."""
    simulation = Simulation(policy)
    for turn in turns:
        simulation.arrive(turn.arrival, turn, np.zeros(0, np.int32))
    simulation.run()
    simulation.scheduler.check()
    short = [record for record in simulation.records if record.turn.kind != "giant"]
    ttft = np.array([record.ttft for record in short]) * 1e3
    tpot = np.array([record.tpot for record in short]) * 1e3
    giants = [record.ttft for record in simulation.records if record.turn.kind == "giant"]
    stats = simulation.scheduler.stats()
    return {
        "TTFT p50, ms": float(np.percentile(ttft, 50)),
        "TTFT p90, ms": float(np.percentile(ttft, 90)),
        "TTFT p99, ms": float(np.percentile(ttft, 99)),
        "TTFT of giants, mean, ms": float(np.mean(giants)) * 1e3,
        "TPOT p50, ms": float(np.percentile(tpot, 50)),
        "TPOT p99, ms": float(np.percentile(tpot, 99)),
        "hit rate, %": 100.0 * stats["hit_tokens"] / stats["query_tokens"],
        "fairness (Jain)": fairness(simulation.records, until),
        "preemptions": float(stats["preemptions"]),
    }


def largest_gap(prompt_len: int = 100000, num_streams: int = 32) -> float:
    """Largest time between two tokens of running streams while a giant prompt is computed, in
    units of the step of a full chunk."""
    simulation = Simulation("fcfs", num_blocks=12000)
    empty: npt.NDArray[np.int32] = np.zeros(0, np.int32)
    rng = np.random.default_rng(0)
    for _ in range(num_streams):
        prompt = rng.integers(1, 100000, 100, dtype=np.int32)
        simulation.arrive(0.0, Turn(prompt, 300, "streams", "chat", 0.0), empty)
    giant = rng.integers(1, 100000, prompt_len, dtype=np.int32)
    simulation.arrive(1.0, Turn(giant, 1, "giants", "giant", 1.0), empty)
    simulation.run()
    streams = simulation.records[:num_streams]
    gap = max(float(np.diff(record.times).max()) for record in streams)
    return gap / simulation.step_time.of(2048)


def draw(name: str, table: dict[str, dict[str, float]], path: Path) -> None:
    """One panel a number, one bar a policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = list(next(iter(table.values())))
    figure, axes = pyplot.subplots(3, 3, figsize=(12, 9), constrained_layout=True)
    for axis, metric in zip(axes.flat, metrics, strict=True):
        values = [row[metric] for row in table.values()]
        bars = axis.bar(list(table), values, color="#4477aa")
        axis.bar_label(bars, fmt="%.4g", fontsize=8)
        axis.set_title(metric, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
    figure.suptitle(f"Policies under the {name} load (simulated)")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    for mix in (poisson(), bursty()):
        table = {policy: measure(policy, make(mix), mix.seconds / 2) for policy in POLICIES}
        print(f"\n{mix.name}")
        for metric in next(iter(table.values())):
            cells = "".join(f"{row[metric]:>12.4g}" for row in table.values())
            print(f"{metric:28}{cells}")
        draw(mix.name, table, options.out / f"schedule-{mix.name}.png")
    print(f"\nlargest gap beside a 100k-token prompt: {largest_gap():.3f} steps of a full chunk")


if __name__ == "__main__":
    main()
