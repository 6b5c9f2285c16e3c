"""The engine: one model's step loop. It knows no sockets and no text.

The loop runs one step ahead: step n is planned and launched before step n-1's tokens are
collected, so that the device never waits for the host.
"""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

import numpy as np

from zllm.errors import EngineError, InvariantError, Overloaded, RequestError
from zllm.native.scheduler import Scheduler
from zllm.native.step_objects import Events, Plan
from zllm.runtime.config import EngineConfig
from zllm.runtime.engine_stats import StepTally
from zllm.runtime.messages import (
    AddRequest,
    EngineReady,
    EngineStats,
    Histogram,
    Load,
    ModelCard,
    RequestRefused,
    RequestStarted,
    StepOutput,
    TokenLogprobs,
)
from zllm.runtime.model_config import ModelConfig
from zllm.runtime.model_runner import ModelRunner, StepResult, Ticket, make_runner

_log = logging.getLogger(__name__)


class _Step(NamedTuple):
    """A launched step that nobody has collected yet. (A frozen dataclass takes four times as long
    to make, every step.)"""

    plan: Plan
    ticket: Ticket
    launched: float


class Engine:
    """Takes requests, gives tokens. Not safe for use by several threads."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.runner: ModelRunner = make_runner(config)
        self.scheduler = Scheduler(
            num_blocks=self.runner.num_kv_blocks,
            num_host_blocks=self.runner.num_host_blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=self.runner.max_num_batched_tokens,
            max_model_len=self.runner.max_model_len,
            enable_prefix_caching=config.enable_prefix_caching,
            swap_cost=self.runner.swap_cost,
            policy=config.scheduling_policy,
            max_queued_requests=config.max_queued_requests,
            max_queued_tokens=config.max_queued_tokens,
        )
        self.runner.allocate_arenas(self.scheduler.arena_words)
        # Made once: the folder may be another by the time that somebody asks.
        self._card = _card(self.runner.model_config)
        self._in_flight: _Step | None = None
        self._broken = False
        self._refused: list[RequestRefused] = []
        self._steps = StepTally()
        self._violations = 0
        self._num_logprobs: dict[int, int] = {}
        self._arena = 0

    def ready(self) -> EngineReady:
        """What the engine serves, for whoever waits for it."""
        return EngineReady(
            max_model_len=self.runner.max_model_len,
            max_num_batched_tokens=self.runner.max_num_batched_tokens,
            num_kv_blocks=self.runner.num_kv_blocks - 1,  # one is nobody's
            startup_report=self.runner.report,
            card=self._card,
            gpu=self.runner.gpu,
        )

    def add(self, request: AddRequest) -> None:
        """Queue a request. One that the scheduler refuses is named in the next StepOutput. Raises
        EngineError where a step did not come to its end."""
        self._require_whole()
        sampling, stopping = request.sampling, request.stopping
        try:
            self.scheduler.add(
                request.request_id,
                np.frombuffer(request.prompt, np.int32),
                now=time.monotonic(),
                max_tokens=stopping.max_tokens,
                min_tokens=stopping.min_tokens,
                eos_token_ids=stopping.eos_token_ids,
                stop_token_ids=stopping.stop_token_ids,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                seed=sampling.seed,
                num_logprobs=request.num_logprobs,
                priority=request.priority,
                salt=request.salt,
                bypass_cache=request.bypass_cache,
                tenant=request.tenant,
                queue_timeout=request.queue_timeout,
                time_limit=stopping.time_limit,
            )
        except Overloaded as error:
            self._refused.append(RequestRefused(request.request_id, str(error)))
        except RequestError as error:
            self._refused.append(RequestRefused(request.request_id, error.reason, error.field))
        else:
            if request.num_logprobs >= 0:
                self._num_logprobs[request.request_id] = request.num_logprobs

    def abort(self, request_ids: list[int]) -> None:
        """End these requests; unknown ids are no error."""
        for request_id in request_ids:
            self.scheduler.abort(request_id)

    def has_work(self) -> bool:
        """Whether `step` has something to do now or once a step in flight is done."""
        if self._broken:
            return False
        return self._in_flight is not None or bool(self._refused) or self.scheduler.has_work()

    def step(self) -> StepOutput | None:
        """Launch the next step, then publish the one before it. None: nothing to tell.

        What interrupts a step, an error or the user, leaves scheduler and device of two minds: the
        engine does nothing any more. Raises EngineError then.
        """
        self._require_whole()
        try:
            return self._step()
        except BaseException:
            self._broken = True
            raise

    def _step(self) -> StepOutput | None:
        now = time.monotonic()
        plan = self.scheduler.plan(now, self.runner.arenas[self._arena])
        launched = None
        if plan is not None:
            launched = _Step(plan, self.runner.launch(plan, self._arena), now)
            self._arena ^= 1
        previous, self._in_flight = self._in_flight, launched
        if previous is None:
            return self._output(self.scheduler.poll(now), None)
        result = self.runner.collect(previous.ticket)
        committed = time.monotonic()
        events = self.scheduler.commit(previous.plan, result.tokens, committed)
        self._steps.add(previous.launched, committed, previous.plan.num_tokens)
        return self._output(events, result)

    def load(self) -> Load:
        """The scheduler's gauges and counters."""
        stats = self.scheduler.stats()
        return Load(
            running_requests=stats["running"],
            queued_requests=stats["waiting"],
            queued_tokens=stats["waiting_tokens"],
            kv_blocks_total=stats["blocks_total"],
            kv_blocks_free=stats["blocks_free"],
            prefix_hit_tokens=stats["hit_tokens"],
            prefix_query_tokens=stats["query_tokens"],
            generated_tokens=stats["generated_tokens"],
            preemptions=stats["preemptions"],
            steps=stats["steps"],
            violations=self._violations,
            admitted_requests=stats["admissions"],
        )

    def stats(self) -> EngineStats:
        """How long tokens were apart and steps took, since start."""
        return EngineStats(Histogram(*self.scheduler.inter_token()), *self._steps.histograms())

    def check(self) -> str | None:
        """Verify the scheduler's books: what is violated, which is also logged and counted, or
        None. Takes time in proportion to the pool: for idle moments."""
        try:
            self.scheduler.check()
        except InvariantError as error:
            self._violations += 1
            _log.error("the scheduler's books do not balance: %s; %s", error, self.load())
            return str(error)
        return None

    def flush_cache(self) -> int:
        """Drop cached blocks that nothing uses; returns how many."""
        return self.scheduler.flush_cache()

    def close(self) -> None:
        """Wait for the step in flight and release the device's memory."""
        if self._in_flight is not None and not self._broken:
            self.runner.collect(self._in_flight.ticket)
        self._in_flight = None
        self.runner.close()

    def _require_whole(self) -> None:
        if self._broken:
            raise EngineError("the engine broke off in an earlier step: make a new one")

    def _output(self, events: Events | None, result: StepResult | None) -> StepOutput | None:
        refused, self._refused = self._refused, []
        if events is None or not len(events.request_ids):
            if not refused:
                return None
            return StepOutput(b"", b"", b"", [], refused, {}, self.load())
        return StepOutput(
            request_ids=events.request_ids.tobytes(),
            tokens=events.tokens.tobytes(),
            finishes=events.finishes.tobytes(),
            started=[RequestStarted(*start) for start in events.started],
            refused=refused,
            logprobs=self._logprobs(events, result),
            load=self.load(),
        )

    def _logprobs(self, events: Events, result: StepResult | None) -> dict[int, TokenLogprobs]:
        """The log-probabilities that requests asked for, by index into the events."""
        if not self._num_logprobs:
            return {}
        found = {}
        for index, (request_id, row) in enumerate(
            zip(events.request_ids.tolist(), events.rows.tolist(), strict=True)
        ):
            wanted = self._num_logprobs.get(request_id, -1)
            if wanted >= 0 and row >= 0 and result is not None:
                found[index] = result.token_logprobs(row, wanted)
            if events.finishes[index]:
                self._num_logprobs.pop(request_id, None)
        return found


def _card(model: ModelConfig) -> ModelCard:
    return ModelCard(
        architectures=(model.architecture,),
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        weight_format=str(model.dtype).removeprefix("torch."),
        temperature=model.sampling.temperature,
        top_p=model.sampling.top_p,
        top_k=model.sampling.top_k,
        min_p=model.sampling.min_p,
    )
