"""An engine without a model: it speaks runtime/messages.py and emits set tokens at a set rate.

Run as a script it is a whole engine process, for tests of the supervisor; STUB_STEP_S in the
environment is its step_s.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from zllm.runtime.clients import Clients
from zllm.runtime.engine_process import EngineLoop
from zllm.runtime.engine_stats import STEP_SECONDS, StepTally, Tally
from zllm.runtime.messages import (
    AddRequest,
    EngineReady,
    EngineStats,
    FinishReason,
    Load,
    ModelCard,
    RequestRefused,
    RequestStarted,
    StepOutput,
    TokenLogprobs,
)

BLOCK = 16
VOCAB = 896
EOS = 832
"""Both of the embedded model, whose tokenizer the tests use."""


@dataclass
class _Sequence:
    request: AddRequest
    prompt: list[int]
    arrived: float
    token_at: float = 0.0
    produced: int = 0
    blocks: int = 0


@dataclass
class StubEngine:
    """Token n of a request is `script[n]`, and EOS after the script's end; without a script the
    prompt is echoed over and over. A running request holds blocks as a real one would."""

    script: list[int] | None = None
    step_s: float = 0.001
    num_blocks: int = 64
    max_running: int = 256
    max_queued: int = 256
    max_model_len: int = 256
    frozen: threading.Event = field(default_factory=threading.Event)
    """While set, no step ends: a hung engine."""
    cached_blocks: int = 7
    cached_tokens: int = 0
    """Of each prompt, so many need not be computed."""
    fail_at: int | None = None
    """Requests end with ERROR at this token."""

    def __post_init__(self) -> None:
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[int, _Sequence] = {}
        self._pending: list[tuple[int, int, int]] = []
        self._refused: list[RequestRefused] = []
        self._counts = {"generated": 0, "steps": 0, "admitted": 0, "prompts": 0}
        self._gaps = Tally(STEP_SECONDS)
        self._steps = StepTally()
        self.seen: list[AddRequest] = []

    def ready(self) -> EngineReady:
        card = ModelCard(("StubForCausalLM",), VOCAB, (EOS,), "float32")
        return EngineReady(self.max_model_len, 2048, self.num_blocks, ["stub engine"], card)

    def add(self, request: AddRequest) -> None:
        self.seen.append(request)
        if len(self._waiting) >= self.max_queued:
            refused = RequestRefused(request.request_id, "the queue is full")
            self._refused.append(refused)
            return
        prompt = np.frombuffer(request.prompt, "<i4").tolist()
        self._waiting.append(_Sequence(request, prompt, time.monotonic()))

    def check(self) -> str | None:
        return None

    def flush_cache(self) -> int:
        """What the last call left cached is nothing: the second one frees none."""
        self.cached_blocks, freed = 0, self.cached_blocks
        return freed

    def abort(self, request_ids: list[int]) -> None:
        for request_id in request_ids:
            waiting = [s for s in self._waiting if s.request.request_id != request_id]
            found = self._running.pop(request_id, None) or len(waiting) < len(self._waiting)
            self._waiting = deque(waiting)
            if found:
                self._pending.append((request_id, -1, FinishReason.ABORTED))

    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._pending or self._refused)

    def step(self) -> StepOutput | None:
        began = time.monotonic()
        time.sleep(self.step_s)
        while self.frozen.is_set():
            time.sleep(0.01)
        self._counts["steps"] += 1
        now = time.monotonic()
        entries, self._pending = self._pending, []
        refused, self._refused = self._refused, []
        started: list[RequestStarted] = []
        logprobs: dict[int, TokenLogprobs] = {}
        self._expire(now, entries)
        self._admit()
        for request_id, sequence in list(self._running.items()):
            if sequence.produced == 0:
                queued, prefill = began - sequence.arrived, now - began
                started.append(RequestStarted(request_id, self.cached_tokens, queued, prefill))
            else:
                self._gaps.add(now - sequence.token_at)
            sequence.token_at = now
            token, finish = self._next(sequence, now)
            if token >= 0 and sequence.request.num_logprobs >= 0:
                logprobs[len(entries)] = _logprobs(token, sequence.request.num_logprobs)
            entries.append((request_id, token, finish))
            if finish:
                del self._running[request_id]
        self._steps.add(began, now, len(self._running))
        if not (entries or refused):
            return None
        ids, tokens, finishes = zip(*entries, strict=True) if entries else ((), (), ())
        return StepOutput(
            np.array(ids, "<i8").tobytes(),
            np.array(tokens, "<i4").tobytes(),
            bytes(finishes),
            started,
            refused,
            logprobs,
            self.load(),
        )

    def load(self) -> Load:
        used = sum(sequence.blocks for sequence in self._running.values())
        return Load(
            running_requests=len(self._running),
            queued_requests=len(self._waiting),
            queued_tokens=sum(len(s.prompt) for s in self._waiting),
            kv_blocks_total=self.num_blocks,
            kv_blocks_free=self.num_blocks - used,
            generated_tokens=self._counts["generated"],
            steps=self._counts["steps"],
            admitted_requests=self._counts["admitted"],
            prefix_query_tokens=self._counts["prompts"],
        )

    def stats(self) -> EngineStats:
        return EngineStats(self._gaps.histogram(), *self._steps.histograms())

    def close(self) -> None:
        self._running.clear()

    def _expire(self, now: float, entries: list[tuple[int, int, int]]) -> None:
        for sequence in list(self._waiting):
            timeout = sequence.request.queue_timeout
            if timeout and now - sequence.arrived > timeout:
                self._waiting.remove(sequence)
                entries.append((sequence.request.request_id, -1, FinishReason.QUEUE_TIMEOUT))

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.max_running:
            sequence = self._waiting.popleft()
            self._counts["admitted"] += 1
            self._counts["prompts"] += len(sequence.prompt)
            self._running[sequence.request.request_id] = sequence

    def _next(self, sequence: _Sequence, now: float) -> tuple[int, int]:
        stopping = sequence.request.stopping
        if stopping.time_limit and now - sequence.arrived > stopping.time_limit:
            return -1, FinishReason.TIME_LIMIT
        if self.fail_at is not None and sequence.produced >= self.fail_at:
            return -1, FinishReason.ERROR
        script = self.script
        if script is None:
            token = next(
                itertools.islice(itertools.cycle(sequence.prompt), sequence.produced, None)
            )
        else:
            token = script[sequence.produced] if sequence.produced < len(script) else EOS
        sequence.produced += 1
        self._counts["generated"] += 1
        length = len(sequence.prompt) + sequence.produced
        sequence.blocks = -(-length // BLOCK)
        if token in stopping.eos_token_ids:
            return token, FinishReason.EOS
        if token in stopping.stop_token_ids:
            return token, FinishReason.STOP
        room = self.max_model_len - len(sequence.prompt)
        if sequence.produced >= min(stopping.max_tokens, room):
            full = stopping.max_tokens > room
            return token, FinishReason.CONTEXT_LIMIT if full else FinishReason.LENGTH
        return token, FinishReason.NONE


def _logprobs(token: int, count: int) -> TokenLogprobs:
    top = [(token + index) % VOCAB for index in range(count)]
    return TokenLogprobs(-0.5, 1, top, [-0.5 - index for index in range(count)])


class EngineThread:
    """The stub behind a real socket, in a thread of the test's process."""

    def __init__(self, engine: StubEngine, address: str) -> None:
        self.engine = engine
        self.address = address
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        clients = Clients(self.address)
        EngineLoop(self.engine, clients, step_limit_s=0.5).run()
        clients.close()

    def join(self) -> None:
        self.engine.frozen.clear()
        self._thread.join(5)
        assert not self._thread.is_alive(), "the engine did not end on Shutdown"


def main(address: str) -> None:
    def watch_parent() -> None:
        while os.read(0, 1 << 16):
            pass
        os._exit(1)

    threading.Thread(target=watch_parent, daemon=True).start()
    step_s = float(os.environ.get("STUB_STEP_S", "0.001"))
    EngineLoop(StubEngine(step_s=step_s), Clients(address)).run()


if __name__ == "__main__":
    main(sys.argv[1])
