"""Sequences that share blocks, and sequences whose blocks go to the host and back."""

from __future__ import annotations

import numpy as np
import pytest

from tests.native.device import next_token
from tests.native.driver import Driver, answer, make_scheduler
from zllm.errors import InvalidRequest
from zllm.native import arena


def prompt_of(length: int, start: int = 1) -> list[int]:
    return [1 + (start * 17 + i * i) % 49 for i in range(length)]


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 90])
def test_the_prompt_of_many_sequences_is_computed_once(
    length: int, overlap: bool, bypass: bool
) -> None:
    driver = Driver(make_scheduler(max_num_batched_tokens=32), overlap=overlap)
    prompt = prompt_of(length)
    driver.add(1, prompt, num_sequences=4, max_tokens=20, eos_token_ids=(), bypass_cache=bypass)
    driver.run()
    for index in range(4):
        assert driver.results[1, index].tokens == answer(prompt, 20, index, eos=())
    # Each fork computes the prompt's last token again: it needs logits of its own.
    assert driver.device.tokens_computed == length + 3 + 4 * 19
    assert driver.scheduler.stats()["forks"] == (3 if length > 1 else 0)


def test_forks_share_the_prompts_blocks_and_copy_the_one_they_write_to() -> None:
    driver = Driver(make_scheduler(), overlap=False)
    driver.add(1, prompt_of(40), num_sequences=4, max_tokens=4, eos_token_ids=())
    driver.step()
    plan = driver.plan()
    assert plan is not None
    assert plan.num_copies == 3
    stats = driver.scheduler.stats()
    assert stats["blocks_total"] - stats["blocks_free"] == 2 + 4
    driver.commit()
    driver.run()


def test_who_waits_for_blocks_gets_them_once_a_running_one_has_cached_the_same_prompt() -> None:
    driver = Driver(make_scheduler(num_blocks=40, max_num_batched_tokens=512, max_model_len=600))
    prompt = prompt_of(400)  # 25 of 39 blocks
    driver.add(1, prompt, max_tokens=150, eos_token_ids=())
    driver.add(2, prompt, max_tokens=2, eos_token_ids=())  # all but one of them are shared
    for _ in range(8):
        driver.step()
    assert driver.results[2, 0].finish
    assert driver.results[2, 0].cached_tokens == 399
    driver.run()


def test_many_forks_of_equal_prompts_fold_into_one_set_of_blocks() -> None:
    """More duplicates at once than a step can note; the rest is folded later."""
    scheduler = make_scheduler(
        num_blocks=300, max_num_seqs=40, max_num_batched_tokens=2048, max_model_len=1024
    )
    driver = Driver(scheduler, max_num_seqs=40, num_blocks=300)
    prompt = prompt_of(640)
    for request_id in range(2):
        driver.add(request_id, prompt, num_sequences=16, max_tokens=9, eos_token_ids=())
    driver.run()
    for (_, index), result in driver.results.items():
        assert result.tokens == answer(prompt, 9, index, max_model_len=1024, eos=())
    assert scheduler.stats()["folded_blocks"] == 40 + 15 * 39 + 30
    assert scheduler.stats()["blocks_cached"] == 40


def test_forks_differ_in_their_seeds() -> None:
    driver = Driver(make_scheduler())
    driver.add(1, prompt_of(9), num_sequences=3, seed=77, temperature=1.0, max_tokens=3)
    driver.run()
    seeds = {tuple(driver.device.params[row][5:7].tolist()) for row in range(3)}
    assert len(seeds) == 3


def test_aborting_a_request_ends_all_its_sequences() -> None:
    for turns in range(10):
        driver = Driver(make_scheduler(max_num_seqs=2), max_num_seqs=2)
        driver.add(1, prompt_of(40), num_sequences=4, max_tokens=6, eos_token_ids=())
        for _ in range(turns):
            driver.step()
        assert driver.scheduler.abort(1)
        driver.run()
        assert {driver.results[1, index].finish for index in range(4)} <= {3, 6}
        assert driver.scheduler.stats()["blocks_free"] == 63


def test_forks_of_a_request_that_ends_before_its_prompt_end_too() -> None:
    driver = Driver(make_scheduler(max_num_batched_tokens=4))
    driver.add(1, prompt_of(100), num_sequences=3, time_limit=5.0)
    driver.run()
    assert [driver.results[1, index].finish for index in range(3)] == [5, 5, 5]


def test_a_beam_forks_from_a_running_sequence() -> None:
    driver = Driver(make_scheduler(), overlap=False)
    prompt = prompt_of(37)
    driver.add(1, prompt, max_tokens=12, eos_token_ids=())
    for _ in range(5):
        driver.step()
    first = list(driver.results[1, 0].tokens)
    assert driver.scheduler.fork(1, 0, 44) == 1
    driver.results[1, 1] = type(driver.results[1, 0])()
    computed = driver.device.tokens_computed
    driver.step()
    assert driver.device.tokens_computed == computed + 2
    driver.run()
    tokens = [*prompt, *first[:-1], 44]
    expected = []
    while len(tokens) < len(prompt) + 12:
        expected.append(next_token(tuple(tokens), 1))
        tokens.append(expected[-1])
    assert driver.results[1, 1].tokens == expected
    assert driver.results[1, 0].tokens == answer(prompt, 12, eos=())


def test_a_fork_needs_a_live_source_with_a_sampled_token() -> None:
    driver = Driver(make_scheduler())
    driver.add(1, prompt_of(5), max_tokens=3)
    with pytest.raises(InvalidRequest, match="sequence 0 has no sampled token"):
        driver.scheduler.fork(1, 0, 3)
    with pytest.raises(InvalidRequest, match="2 is not that of a live request"):
        driver.scheduler.fork(2, 0, 3)
    driver.run()


@pytest.mark.parametrize("overlap", [False, True])
def test_swapped_sequences_compute_no_token_twice(overlap: bool) -> None:
    scheduler = make_scheduler(num_blocks=13, num_host_blocks=64)
    driver = Driver(scheduler, num_blocks=13, overlap=overlap)
    for i in range(8):
        driver.add(i, prompt_of(20, i), max_tokens=100, eos_token_ids=())
    driver.run()
    for i in range(8):
        assert driver.results[i, 0].tokens == answer(prompt_of(20, i), 100, eos=())
    stats = scheduler.stats()
    assert stats["preemptions"] == stats["swaps_out"] > 0
    assert stats["preempted_tokens"] == 0
    assert driver.device.tokens_computed == 8 * (20 + 99)
    assert stats["host_blocks_free"] == 64


def test_a_sequence_is_computed_again_where_swapping_costs_more() -> None:
    scheduler = make_scheduler(num_blocks=13, num_host_blocks=64, swap_cost=17.0)
    driver = Driver(scheduler, num_blocks=13)
    for i in range(8):
        driver.add(i, prompt_of(20, i), max_tokens=100, eos_token_ids=())
    driver.run()
    stats = scheduler.stats()
    assert stats["swaps_out"] == 0
    assert stats["preempted_tokens"] > 0


def test_a_full_host_falls_back_to_computing_again() -> None:
    scheduler = make_scheduler(num_blocks=13, num_host_blocks=4)
    driver = Driver(scheduler, num_blocks=13)
    for i in range(8):
        driver.add(i, prompt_of(20, i), max_tokens=100, eos_token_ids=())
    driver.run()
    for i in range(8):
        assert driver.results[i, 0].tokens == answer(prompt_of(20, i), 100, eos=())
    assert scheduler.stats()["preempted_tokens"] > 0


def test_a_step_swaps_no_more_blocks_than_two_whole_contexts_have() -> None:
    scheduler = make_scheduler(num_blocks=25, num_host_blocks=200, max_num_batched_tokens=512)
    driver = Driver(scheduler, num_blocks=25, overlap=False)
    driver.add(1, prompt_of(224), num_sequences=8, max_tokens=30, eos_token_ids=())
    driver.run()
    most = max(np.frombuffer(raw, np.int32)[arena.H_NUM_SWAP_OUT] for raw in driver.plans)
    assert 0 < most <= 2 * 256 // 16
    for index in range(8):
        assert driver.results[1, index].tokens == answer(prompt_of(224), 30, index, eos=())


def test_the_victim_is_the_sequence_that_loses_least() -> None:
    scheduler = make_scheduler(num_blocks=16, max_model_len=300)
    driver = Driver(scheduler, num_blocks=16, overlap=False)
    for i, length in enumerate([60, 20, 70]):
        driver.add(i, prompt_of(length, i), max_tokens=150, eos_token_ids=())
    while scheduler.stats()["preemptions"] == 0:
        driver.step()
    lengths = [length + len(driver.results[i, 0].tokens) for i, length in enumerate([60, 20, 70])]
    assert scheduler.stats()["preempted_tokens"] < min(lengths[0], lengths[2])
    assert scheduler.stats()["preempted_tokens"] <= lengths[1]
    driver.run()


def advanced_beside_the_first_preemption(driver: Driver, count: int) -> list[bool]:
    """Which of so many requests got a token in the step after it."""
    while driver.scheduler.stats()["preemptions"] == 0:
        driver.step()
    before = [len(driver.results[i, 0].tokens) for i in range(count)]
    driver.step()
    return [len(driver.results[i, 0].tokens) > before[i] for i in range(count)]


def test_of_those_that_lose_the_same_the_last_to_arrive_is_the_victim() -> None:
    driver = Driver(make_scheduler(num_blocks=10), num_blocks=10, overlap=False)
    for i in range(3):
        driver.add(i, prompt_of(20, i), max_tokens=80, eos_token_ids=())
    assert advanced_beside_the_first_preemption(driver, 3) == [True, True, False]


def test_under_the_priority_policy_the_lowest_priority_is_the_victim() -> None:
    scheduler = make_scheduler(num_blocks=14, policy="priority")
    driver = Driver(scheduler, num_blocks=14, overlap=False)
    for i, (length, priority) in enumerate([(50, 0), (50, 0), (34, 5)]):  # the last loses least
        driver.add(i, prompt_of(length, i), max_tokens=120, eos_token_ids=(), priority=priority)
        driver.step()
    assert advanced_beside_the_first_preemption(driver, 3) == [True, False, True]


def test_the_oldest_sequence_is_never_the_victim() -> None:
    scheduler = make_scheduler(num_blocks=10)
    driver = Driver(scheduler, num_blocks=10, overlap=False)
    driver.add(0, prompt_of(10, 0), max_tokens=120, eos_token_ids=())
    driver.add(1, prompt_of(80, 1), max_tokens=120, eos_token_ids=())
    while scheduler.stats()["preemptions"] == 0:
        driver.step()
    assert scheduler.stats()["preempted_tokens"] > 80
    before = len(driver.results[0, 0].tokens)
    driver.step()
    assert len(driver.results[0, 0].tokens) == before + 1
    driver.run()


def test_forks_that_went_their_own_way_share_no_more() -> None:
    """Preempted among their siblings, they come back with tokens of their own."""
    for num_host_blocks in (0, 40):
        scheduler = make_scheduler(num_blocks=12, num_host_blocks=num_host_blocks)
        driver = Driver(scheduler, num_blocks=12)
        for request_id in range(3):
            driver.add(
                request_id,
                prompt_of(40),
                num_sequences=3,
                max_tokens=70,
                eos_token_ids=(),
                bypass_cache=request_id == 1,
            )
        driver.run()
        assert scheduler.stats()["preemptions"] > 0
        for (_, index), result in driver.results.items():
            assert result.tokens == answer(prompt_of(40), 70, index, eos=())
