"""A state machine: plan, commit, arrivals, aborts, forks and time at any point of the overlap.

The model is a list of what each request must get, and the device, which knows the tokens behind
every slot. After each move the scheduler checks its own books too.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.native.driver import Driver, Result, answer, make_scheduler
from zllm.errors import InvalidRequest

LENGTH, CONTEXT_LIMIT, TIME_LIMIT, ABORTED, QUEUE_TIMEOUT, ERROR = 3, 4, 5, 6, 100, 101
STEM = [1 + i * i % 49 for i in range(120)]


class Interleavings(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(3, 30),
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(1, 40),
        num_host_blocks=st.sampled_from([0, 0, 6, 40]),
        policy=st.sampled_from(["fcfs", "priority", "sjf", "lpm", "fair"]),
        caching=st.booleans(),
        patience=st.sampled_from([0, 2, 100]),
    )
    def start(
        self,
        num_blocks: int,
        max_num_seqs: int,
        budget: int,
        num_host_blocks: int,
        policy: str,
        caching: bool,
        patience: int,
    ) -> None:
        scheduler = make_scheduler(
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            num_host_blocks=num_host_blocks,
            policy=policy,
            enable_prefix_caching=caching,
            patience=patience,
        )
        self.driver = Driver(scheduler, max_num_seqs=max_num_seqs, num_blocks=num_blocks)
        self.prompts: dict[tuple[int, int], int] = {}
        self.expected: dict[tuple[int, int], list[int]] = {}
        self.limits: dict[tuple[int, int], set[int]] = {}
        self.num_requests = 0
        self.num_slots = 16 * (num_blocks - 1)

    @rule(
        shared=st.integers(0, 100),
        own=st.lists(st.integers(1, 49), min_size=1, max_size=24),
        max_tokens=st.sampled_from([1, 2, 5, 20, 60, 400]),
        num_sequences=st.sampled_from([1, 1, 1, 3]),
        priority=st.integers(0, 2),
        tenant=st.sampled_from("ab"),
        bypass=st.booleans(),
        queue_timeout=st.sampled_from([0, 0, 3]),
        time_limit=st.sampled_from([0, 0, 6]),
    )
    def add(
        self,
        shared: int,
        own: list[int],
        max_tokens: int,
        num_sequences: int,
        priority: int,
        tenant: str,
        bypass: bool,
        queue_timeout: int,
        time_limit: int,
    ) -> None:
        prompt = STEM[:shared] + own
        request_id = self.num_requests
        fits = len(prompt) <= 16 * int(self.driver.scheduler.stats()["blocks_total"])
        with nullcontext() if fits else pytest.raises(InvalidRequest, match="prompt: "):
            self.driver.add(
                request_id,
                prompt,
                max_tokens=max_tokens,
                num_sequences=num_sequences,
                priority=priority,
                tenant=tenant,
                bypass_cache=bypass,
                queue_timeout=queue_timeout,
                time_limit=time_limit,
            )
        if not fits:
            return
        self.num_requests += 1
        for index in range(num_sequences):
            self.prompts[request_id, index] = len(prompt)
            self.expected[request_id, index] = answer(prompt, max_tokens, index)
            self.limits[request_id, index] = {ABORTED, CONTEXT_LIMIT}
            if queue_timeout:
                self.limits[request_id, index].add(QUEUE_TIMEOUT)
            if time_limit:
                self.limits[request_id, index].add(TIME_LIMIT)

    @precondition(lambda self: self.num_requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.integers(0, self.num_requests - 1))
        live = any(
            result.finish == 0
            for (request, _), result in self.driver.results.items()
            if request == request_id
        )
        aborted = self.driver.scheduler.abort(request_id)
        assert live or not aborted
        self.driver.verify()

    @precondition(lambda self: not self.driver.in_flight)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        """A beam's other continuation: the last token is replaced."""
        running = [
            key
            for key, result in self.driver.results.items()
            if result.tokens and not result.finish
        ]
        if not running:
            return
        source = data.draw(st.sampled_from(running))
        try:
            index = self.driver.scheduler.fork(source[0], source[1], 50)
        except InvalidRequest:  # its end is not reported yet
            return
        self.driver.results[source[0], index] = Result(cached_tokens=0)
        self.limits[source[0], index] = {ABORTED, CONTEXT_LIMIT, TIME_LIMIT, QUEUE_TIMEOUT, LENGTH}
        self.driver.verify()

    @precondition(lambda self: len(self.driver.in_flight) < 2)
    @rule()
    def plan(self) -> None:
        self.driver.plan()

    @precondition(lambda self: self.driver.in_flight)
    @rule()
    def commit(self) -> None:
        self.driver.commit()

    @rule(turns=st.integers(1, 12))
    def go_on(self, turns: int) -> None:
        for _ in range(turns):
            self.driver.step()

    @precondition(lambda self: self.driver.in_flight)
    @rule(data=st.data())
    def break_a_row(self, data: st.DataObject) -> None:
        """Non-finite logits: the row's request ends, and it alone."""
        _, sampled = self.driver.in_flight[0]
        sampled[data.draw(st.integers(0, len(sampled) - 1))] = -1
        for limits in self.limits.values():
            limits.add(ERROR)

    @rule()
    def flush(self) -> None:
        self.driver.scheduler.flush_cache()
        self.driver.verify()

    @invariant()
    def everybody_gets_what_was_asked_for(self) -> None:
        if not hasattr(self, "driver"):
            return
        for key, expected in self.expected.items():
            result = self.driver.results[key]
            assert result.tokens == expected[: len(result.tokens)]
            if result.finish and result.finish not in self.limits[key]:
                assert result.tokens == expected
            if result.finish == CONTEXT_LIMIT:
                length = self.prompts[key] + len(result.tokens)
                assert length == 256 or length > self.num_slots

    def teardown(self) -> None:
        if not hasattr(self, "driver"):
            return
        self.driver.run(20000)
        self.everybody_gets_what_was_asked_for()
        assert all(result.finish for result in self.driver.results.values())
        stats = self.driver.scheduler.stats()
        assert stats["blocks_free"] == stats["blocks_total"]
        assert stats["running"] == stats["waiting"] == 0


class TestInterleavings(Interleavings.TestCase):  # type: ignore[misc, name-defined]
    settings = settings(
        max_examples=150,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


@pytest.mark.slow
class TestInterleavingsAtLength(Interleavings.TestCase):  # type: ignore[misc, name-defined]
    """Well over 100,000 moves."""

    settings = settings(
        max_examples=3000,
        stateful_step_count=100,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
