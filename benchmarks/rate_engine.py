"""An engine that computes nothing: every running request gets a token each step, at a set rate.

Run by rate_service.py in place of runtime/engine_process.py. The environment says how:
ZLLM_BENCH_STEP_S, the step's length in seconds; ZLLM_BENCH_TIMES, a file for the time of each step;
ZLLM_BENCH_CPUS, the cores to stay on, with commas between them.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
import time
from typing import BinaryIO

import numpy as np

from zllm.runtime.clients import Clients
from zllm.runtime.engine_process import EngineLoop
from zllm.runtime.messages import (
    AddRequest,
    EngineReady,
    EngineStats,
    FinishReason,
    Load,
    ModelCard,
    RequestStarted,
    StepOutput,
)

VOCAB, EOS = 896, 832
"""The embedded model's, whose tokenizer detokenizes."""
DISTINCT = 800
"""Step n's token is n modulo this, so that a reader knows which step a token is from."""


class RateEngine:
    """Steppable (runtime/engine_process.py) with flat arrays, so that it is never the slow part."""

    def __init__(self, step_s: float, times: BinaryIO) -> None:
        self._step_s = step_s
        self._times = times
        self._next_step = 0.0
        self._ids = np.zeros(0, np.int64)
        self._left = np.zeros(0, np.int64)
        self._new: list[AddRequest] = []
        self._steps = 0

    def ready(self) -> EngineReady:
        card = ModelCard(("RateEngine",), VOCAB, (EOS,), "none")
        return EngineReady(1 << 20, 8192, 1 << 20, ["an engine at a set rate"], card)

    def add(self, request: AddRequest) -> None:
        self._new.append(request)

    def abort(self, request_ids: list[int]) -> None:
        keep = ~np.isin(self._ids, request_ids)
        self._ids, self._left = self._ids[keep], self._left[keep]
        self._new = [request for request in self._new if request.request_id not in request_ids]

    def step(self) -> StepOutput | None:
        now = time.monotonic()
        if now < self._next_step:
            time.sleep(self._next_step - now)
        self._next_step = max(now, self._next_step) + self._step_s
        started = [RequestStarted(request.request_id, 0, 0.0) for request in self._new]
        if self._new:
            ids = [request.request_id for request in self._new]
            left = [request.stopping.max_tokens for request in self._new]
            self._ids = np.concatenate([self._ids, np.array(ids, np.int64)])
            self._left = np.concatenate([self._left, np.array(left, np.int64)])
            self._new = []
        self._left -= 1
        over = self._left <= 0
        token = self._steps % DISTINCT
        self._times.write(struct.pack("d", time.monotonic()))
        output = StepOutput(
            request_ids=self._ids.tobytes(),
            tokens=np.full(len(self._ids), token, np.int32).tobytes(),
            finishes=(over * np.uint8(FinishReason.LENGTH)).astype(np.uint8).tobytes(),
            started=started,
            refused=[],
            logprobs={},
            load=self.load(),
        )
        self._ids, self._left = self._ids[~over], self._left[~over]
        self._steps += 1
        return output

    def has_work(self) -> bool:
        return bool(len(self._ids) or self._new)

    def load(self) -> Load:
        return Load(running_requests=len(self._ids), kv_blocks_total=1 << 20, steps=self._steps)

    def stats(self) -> EngineStats:
        return EngineStats()

    def flush_cache(self) -> int:
        return 0

    def check(self) -> str | None:
        return None

    def close(self) -> None:
        self._ids = self._ids[:0]


def main(address: str) -> None:
    def watch_parent() -> None:
        while os.read(0, 1 << 16):
            pass
        os._exit(1)

    threading.Thread(target=watch_parent, daemon=True).start()
    cpus = os.environ.get("ZLLM_BENCH_CPUS", "")
    if cpus:
        os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
    path = os.environ.get("ZLLM_BENCH_TIMES", "")
    with open(path or os.devnull, "wb", buffering=0) as times:
        engine = RateEngine(float(os.environ["ZLLM_BENCH_STEP_S"]), times)
        EngineLoop(engine, Clients(address)).run()


if __name__ == "__main__":
    main(sys.argv[1])
