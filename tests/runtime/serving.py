"""Drives scheduler and runner one step ahead, keeping the logits of every sampled token."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zllm.native import arena as layout
from zllm.native.scheduler import Scheduler
from zllm.native.step_objects import Plan
from zllm.runtime.config import EngineConfig
from zllm.runtime.model_runner import Ticket, make_runner
from zllm.runtime.ops import Hidden, Logits


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    count: int
    arrival: int = 0
    """The step before which it comes."""
    options: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.0})


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    logprobs: list[tuple[float, int, list[int], list[float]]] = field(default_factory=list)
    finish: int = 0


class Server:
    """A runner with a scheduler before it. On the GPU it sees logits only under enforce_eager."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        settings = {"num_kv_blocks": 200, "max_num_seqs": 17, "device": "cpu", **settings}
        self.config = EngineConfig(model=folder, **settings)
        self.runner: Any = make_runner(self.config)
        self.scheduler = Scheduler(
            num_blocks=self.runner.num_kv_blocks,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.runner.max_num_batched_tokens,
            max_model_len=self.runner.max_model_len,
            num_host_blocks=self.runner.num_host_blocks,
            swap_cost=self.runner.swap_cost,
            enable_prefix_caching=self.config.enable_prefix_caching,
        )
        self.runner.allocate_arenas(self.scheduler.arena_words)
        self.longest_step = 0
        self._seen: list[Tensor] = []
        logits = self.runner.model.logits

        def spy(ops: Any, hidden: Hidden) -> Logits:
            out = logits(ops, hidden)
            if self.config.device == "cpu" or self.config.enforce_eager:
                self._seen.append(out.x.to("cpu", copy=True))
            return out

        self.runner.model.logits = spy

    def serve(self, requests: list[Request]) -> list[Answer]:
        """Run all requests to their end; each step is planned before the last is committed."""
        answers: dict[int, Answer] = defaultdict(Answer)
        waiting = sorted(enumerate(requests), key=lambda item: item[1].arrival)
        previous: tuple[Plan, Ticket, dict[int, Tensor]] | None = None
        step = 0
        while waiting or previous or self.scheduler.has_work():
            while waiting and waiting[0][1].arrival <= step:
                index, request = waiting.pop(0)
                self.scheduler.add(
                    index,
                    np.array(request.prompt, np.int32),
                    now=0.0,
                    max_tokens=request.count,
                    **request.options,
                )
            arena = self.runner.arenas[step % 2]
            plan = self.scheduler.plan(0.0, arena)
            launched = None
            if plan is not None:
                launched = (plan, self.runner.launch(plan, step % 2), self._logits(arena))
                self.longest_step = max(self.longest_step, plan.num_tokens)
            if previous is not None:
                self._commit(*previous, answers)
            previous = launched
            step += 1
            assert step < 10_000, "the scheduler makes no progress"
        self.scheduler.check()
        return [answers[index] for index in range(len(requests))]

    def _logits(self, arena: npt.NDArray[np.int32]) -> dict[int, Tensor]:
        """The step's logits by row of the step."""
        start = arena[layout.H_FLAGS]
        flags = arena[start : start + arena[layout.H_NUM_ROWS]]
        sampled = np.flatnonzero(flags & layout.F_SAMPLE).tolist()
        seen, self._seen = self._seen, []
        return dict(zip(sampled, seen[0], strict=True)) if seen else {}

    def _commit(
        self,
        plan: Plan,
        ticket: Ticket,
        logits: dict[int, Tensor],
        answers: dict[int, Answer],
    ) -> None:
        result = self.runner.collect(ticket)
        events = self.scheduler.commit(plan, result.tokens, 0.0)
        for index, request_id in enumerate(events.request_ids.tolist()):
            answer = answers[request_id]
            token, row = int(events.tokens[index]), int(events.rows[index])
            if token >= 0:
                answer.tokens.append(token)
                if row in logits:
                    answer.logits.append(logits[row])
                if result.logprobs is not None:
                    found = result.token_logprobs(row, 5)
                    answer.logprobs.append(
                        (found.logprob, found.rank, found.top_ids, found.top_logprobs)
                    )
            answer.finish = answer.finish or int(events.finishes[index])


def random_prompts(count: int, vocab: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to `longest` random tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]
