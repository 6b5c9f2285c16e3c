"""Drives a scheduler over the Python device, with and without overlap."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from tests.native.device import VOCAB, Device, extend, sample
from zllm.native import arena as layout
from zllm.native.scheduler import Scheduler
from zllm.native.step_objects import Plan

EOS = 0


def make_scheduler(
    *,
    num_blocks: int = 64,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    max_model_len: int = 256,
    **options: object,
) -> Scheduler:
    """A small scheduler; `options` go to its constructor."""
    return Scheduler(
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        **options,  # type: ignore[arg-type]
    )


def answer(
    prompt: list[int],
    max_tokens: int,
    index: int = 0,
    *,
    max_model_len: int = 256,
    eos: tuple[int, ...] = (EOS,),
) -> list[int]:
    """What a request's sequence must get, however it is scheduled."""
    state = 0
    for token in prompt:
        state = extend(state, token)
    out: list[int] = []
    while len(out) < max_tokens and len(prompt) + len(out) < max_model_len:
        out.append(sample(state, index))
        state = extend(state, out[-1])
        if out[-1] in eos:
            break
    return out


@dataclass
class Result:
    """What a sequence got."""

    tokens: list[int] = field(default_factory=list)
    finish: int = 0
    cached_tokens: int = -1


class Driver:
    """The engine's loop: plan one step ahead if `overlap`, launch, commit the step before."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        max_num_seqs: int = 8,
        num_blocks: int = 64,
        overlap: bool = True,
        check: bool = True,
    ) -> None:
        self.scheduler = scheduler
        self.device = Device(max_num_seqs, num_blocks, VOCAB)
        self.depth = 2 if overlap else 1
        self.check = check
        self.in_flight: deque[tuple[Plan, np.ndarray]] = deque()
        self.results: dict[tuple[int, int], Result] = {}
        self.now = 0.0
        self.plans: list[bytes] = []

    def add(self, request_id: int, prompt: list[int], **options: object) -> None:
        options.setdefault("max_tokens", 8)
        options.setdefault("eos_token_ids", (EOS,))
        options.setdefault("temperature", 0.0)
        self.scheduler.add(
            request_id,
            np.array(prompt, np.int32),
            now=self.now,
            **options,  # type: ignore[arg-type]
        )
        for index in range(int(options.get("num_sequences", 1))):  # type: ignore[call-overload]
            self.results[request_id, index] = Result()

    def plan(self) -> Plan | None:
        """Plan and launch a step."""
        arena = np.full(self.scheduler.arena_words, -7, np.int32)
        plan = self.scheduler.plan(self.now, arena)
        if plan is not None:
            assert plan.num_words == int(arena[layout.H_NUM_WORDS])
            self.plans.append(arena[: plan.num_words].tobytes())
            self.in_flight.append((plan, self.device.run(arena)))
        self.verify()
        return plan

    def commit(self) -> None:
        """Commit the oldest step in flight."""
        plan, sampled = self.in_flight.popleft()
        self.record(self.scheduler.commit(plan, sampled, self.now))
        self.verify()

    def poll(self) -> None:
        events = self.scheduler.poll(self.now)
        if events is not None:
            self.record(events)
        self.verify()

    def record(self, events: object) -> None:
        for request_id, index, token, finish in zip(
            events.request_ids.tolist(),  # type: ignore[attr-defined]
            events.sequences.tolist(),  # type: ignore[attr-defined]
            events.tokens.tolist(),  # type: ignore[attr-defined]
            events.finishes.tolist(),  # type: ignore[attr-defined]
            strict=True,
        ):
            result = self.results[request_id, index]
            assert result.finish == 0, "an event after the finish"
            if token >= 0:
                result.tokens.append(token)
            result.finish = finish
        for request_id, cached, _, _ in events.started:  # type: ignore[attr-defined]
            assert self.results[request_id, 0].cached_tokens == -1, "started twice"
            self.results[request_id, 0].cached_tokens = cached

    def verify(self) -> None:
        if self.check:
            self.scheduler.check()

    def step(self) -> None:
        """One turn of the engine's loop, which polls only when it has nothing to commit."""
        self.now += 1.0
        if len(self.in_flight) == 2:
            self.commit()
        plan = self.plan()
        if self.in_flight and (plan is None or len(self.in_flight) == self.depth):
            self.commit()
        else:
            self.poll()

    def run(self, limit: int = 10000) -> None:
        """Turn until nothing is left."""
        for _ in range(limit):
            if not self.scheduler.has_work():
                return
            self.step()
        raise AssertionError(f"work is left after {limit} steps: {self.scheduler.stats()}")
