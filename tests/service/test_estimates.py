"""Estimates of waiting: never negative, never wild, monotone, and right where the past repeats."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zllm.runtime.messages import Load
from zllm.service.estimates import (
    FORGET_S,
    LONGEST_S,
    SHORTEST_RETRY_S,
    UNKNOWN_RETRY_S,
    FirstTokenEstimate,
    QueueEstimate,
)

COUNTS = st.integers(0, 10**9)
LOOKS = st.lists(
    st.tuples(st.floats(0, 100), st.integers(0, 10**4), COUNTS, COUNTS, COUNTS), max_size=30
)
"""Seconds since the last look; waiting requests; growth of the three counters."""
PROMPTS = st.lists(
    st.tuples(st.integers(1, 10**6), st.floats(0, 1), st.floats(0, 1000)), max_size=30
)
"""Tokens, the share of them that is cached, seconds."""
NOW = 1000.0


def queue_of(looks: list[tuple[float, int, int, int, int]]) -> QueueEstimate:
    queue = QueueEstimate()
    now, admitted, queried, hit = 0.0, 0, 0, 0
    for seconds, waiting, requests, prompts, cached in looks:
        now += seconds
        admitted += requests
        queried += prompts + cached
        hit += cached
        queue.note(
            now,
            Load(
                queued_requests=waiting,
                admitted_requests=admitted,
                prefix_query_tokens=queried,
                prefix_hit_tokens=hit,
            ),
        )
    return queue


def steady(requests: int, tokens: int, *, waiting: int = 5) -> QueueEstimate:
    """Ten seconds in which so much was admitted each second."""
    return queue_of([(1.0, waiting, requests, tokens, 7)] * 11)


def first_tokens_of(prompts: list[tuple[int, float, float]]) -> FirstTokenEstimate:
    estimate = FirstTokenEstimate()
    for tokens, cached, seconds in prompts:
        estimate.note(NOW, tokens, int(tokens * cached), seconds)
    return estimate


def test_a_steady_queue_is_foretold() -> None:
    queue = steady(requests=20, tokens=4000)
    assert queue.wait(100, 0) == pytest.approx(5.0)
    assert queue.wait(0, 12_000) == pytest.approx(3.0)
    assert queue.wait(100, 12_000) == pytest.approx(5.0), "the slower of the two"
    assert queue.retry_after(Load(queued_requests=100, queued_tokens=10)) == pytest.approx(2.5)


def test_without_history_nothing_waits_and_the_retry_is_a_second() -> None:
    queue = QueueEstimate()
    assert queue.wait(10**9, 10**9) == 0
    assert queue.retry_after(Load(queued_requests=10)) == UNKNOWN_RETRY_S
    assert FirstTokenEstimate().time(NOW, 10**9) == 0


def test_arrivals_to_an_empty_queue_are_no_measure_of_the_engine() -> None:
    queue = steady(requests=1, tokens=10, waiting=0)
    assert queue.wait(1000, 10_000) == 0


def test_a_queue_that_stands_still_takes_as_long_as_any() -> None:
    queue = steady(requests=0, tokens=0)
    assert queue.wait(1, 0) == queue.wait(0, 1) == LONGEST_S


def test_what_was_lately_counts_most() -> None:
    looks = [(1.0, 5, 100, 0, 0)] * 60 + [(1.0, 5, 10, 0, 0)] * 30
    assert queue_of(looks).wait(10, 0) == pytest.approx(1.0, rel=0.2)


def test_looks_in_quick_succession_are_one() -> None:
    quick = queue_of([(0.01, 5, 1, 100, 0)] * 1001)
    slow = queue_of([(0.1, 5, 10, 1000, 0)] * 101)
    assert quick.wait(100, 0) == pytest.approx(slow.wait(100, 0), rel=0.02)


@given(LOOKS, COUNTS, COUNTS, COUNTS, COUNTS)
def test_a_wait_is_bounded_and_grows_with_what_is_ahead(
    looks: list[tuple[float, int, int, int, int]],
    requests: int,
    tokens: int,
    more: int,
    longer: int,
) -> None:
    queue = queue_of(looks)
    wait = queue.wait(requests, tokens)
    assert 0 <= wait <= queue.wait(requests + more, tokens + longer) <= LONGEST_S
    load = Load(queued_requests=requests, queued_tokens=tokens)
    assert SHORTEST_RETRY_S <= queue.retry_after(load) <= LONGEST_S
    assert queue.wait(0, 0) == 0


def test_a_line_through_first_tokens_is_found() -> None:
    estimate = first_tokens_of([(n, 0.0, 0.02 + n * 1e-4) for n in (10, 500, 2000, 100, 1000)])
    assert estimate.time(NOW, 0) == pytest.approx(0.02)
    assert estimate.time(NOW, 4000) == pytest.approx(0.42)


def test_cached_tokens_take_no_time() -> None:
    prompts = [(n, 0.5, n * 1e-4) for n in (100, 500, 2000)]
    assert first_tokens_of(prompts).time(NOW, 1000) == pytest.approx(0.1, rel=0.01)


def test_prompts_of_one_length_say_nothing_of_others() -> None:
    estimate = first_tokens_of([(100, 0.0, 0.05)] * 50)
    assert estimate.time(NOW, 1) == estimate.time(NOW, 10_000) == pytest.approx(0.05)


def test_what_first_tokens_once_took_is_forgotten_where_none_comes() -> None:
    estimate = first_tokens_of([(100, 0.0, 3.0)] * 100)
    assert estimate.time(NOW + FORGET_S, 100) == pytest.approx(3.0)
    later = NOW + FORGET_S + 0.1
    assert estimate.time(later, 100) == 0, "those who are refused bring no newer one"
    estimate.note(later, 100, 0, 0.01)
    assert estimate.time(later, 100) == pytest.approx(0.01)


def test_a_few_first_tokens_after_a_while_outweigh_many_before() -> None:
    estimate = first_tokens_of([(100, 0.0, 3.0)] * 100)
    for turn in range(1, 11):
        estimate.note(NOW + 4 * turn, 100, 0, 0.01)
    assert estimate.time(NOW + 40, 100) < 0.3


@given(PROMPTS, COUNTS, COUNTS)
def test_a_first_token_is_bounded_and_no_sooner_for_a_longer_prompt(
    prompts: list[tuple[int, float, float]], tokens: int, more: int
) -> None:
    estimate = first_tokens_of(prompts)
    time = estimate.time(NOW, tokens)
    assert 0 <= time <= estimate.time(NOW, tokens + more) <= LONGEST_S
    assert math.isfinite(time)
