"""The scheduler's promises, one request or a few at a time, on a device made of Python lists."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.native.device import next_token
from tests.native.driver import EOS, Driver, answer, make_scheduler
from zllm.errors import ConfigError, InvalidRequest, Overloaded, RequestExists
from zllm.native import arena

LENGTH, CONTEXT_LIMIT, TIME_LIMIT, ABORTED, QUEUE_TIMEOUT, ERROR = 3, 4, 5, 6, 100, 101


def prompt_of(length: int, start: int = 1) -> list[int]:
    return [1 + (start * 17 + i * i) % 49 for i in range(length)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("budget", [1, 5, 16, 64])
def test_every_request_gets_its_tokens(overlap: bool, budget: int) -> None:
    driver = Driver(make_scheduler(max_num_batched_tokens=budget), overlap=overlap)
    prompts = {i: prompt_of(3 + 11 * i, i) for i in range(6)}
    for i, prompt in prompts.items():
        driver.add(i, prompt, max_tokens=20)
    driver.run()
    for i, prompt in prompts.items():
        assert driver.results[i, 0].tokens == answer(prompt, 20)


def test_decodes_go_first_and_chunks_fill_the_budget() -> None:
    driver = Driver(make_scheduler(max_num_batched_tokens=16), overlap=False)
    driver.add(1, prompt_of(4), eos_token_ids=(), max_tokens=50)
    driver.step()
    driver.add(2, prompt_of(60, 2), max_tokens=2)
    plan = driver.plan()
    assert plan is not None
    assert (plan.num_rows, plan.num_decodes, plan.num_tokens) == (2, 1, 16)
    driver.commit()


def test_a_step_ahead_reads_the_token_on_the_device() -> None:
    scheduler = make_scheduler()
    driver = Driver(scheduler)
    driver.add(1, prompt_of(4), max_tokens=5, eos_token_ids=())
    driver.plan()
    driver.plan()
    words = np.frombuffer(driver.plans[1], np.int32)
    assert words[words[arena.H_FLAGS]] == arena.F_SAMPLE | arena.F_TOKEN_ON_DEVICE
    with pytest.raises(ValueError, match="two steps are in flight"):
        driver.plan()


def test_a_sequence_is_not_planned_beyond_its_last_token() -> None:
    driver = Driver(make_scheduler())
    driver.add(1, prompt_of(4), max_tokens=2, eos_token_ids=())
    assert driver.plan() is not None
    assert driver.plan() is not None
    driver.commit()
    assert driver.plan() is None
    driver.commit()
    assert driver.results[1, 0].finish == LENGTH
    assert not driver.scheduler.has_work()


def test_the_surplus_token_after_the_end_is_dropped() -> None:
    prompt = next([1, 2, 3, n] for n in range(1, 99) if next_token((1, 2, 3, n)) == EOS)
    driver = Driver(make_scheduler())
    driver.add(1, prompt, max_tokens=9)
    driver.plan()
    driver.plan()
    driver.commit()
    assert driver.results[1, 0].finish == 1
    assert driver.scheduler.stats()["running"] == 0
    assert driver.scheduler.stats()["blocks_free"] < driver.scheduler.stats()["blocks_total"]
    driver.commit()
    assert driver.results[1, 0].tokens == [EOS]
    assert driver.scheduler.stats()["blocks_free"] == driver.scheduler.stats()["blocks_total"]


def test_finish_reasons() -> None:
    prompt = prompt_of(6)
    full = answer(prompt, 40, eos=())
    driver = Driver(make_scheduler(max_model_len=30))
    driver.add(1, prompt, max_tokens=10, eos_token_ids=())
    driver.add(2, prompt, max_tokens=500, eos_token_ids=())
    driver.add(3, prompt, max_tokens=10, eos_token_ids=(full[3],), stop_token_ids=(full[1],))
    driver.add(4, prompt, max_tokens=10, eos_token_ids=(full[1],), stop_token_ids=(full[1],))
    driver.run()
    assert (driver.results[1, 0].finish, driver.results[1, 0].tokens) == (
        LENGTH,
        full[:10],
    )
    assert (driver.results[2, 0].finish, len(driver.results[2, 0].tokens)) == (
        CONTEXT_LIMIT,
        24,
    )
    assert (driver.results[3, 0].finish, driver.results[3, 0].tokens) == (2, full[:2])
    assert (driver.results[4, 0].finish, driver.results[4, 0].tokens) == (1, full[:2])


def test_an_answer_that_just_fits_the_context_ends_by_its_length() -> None:
    driver = Driver(make_scheduler(max_model_len=30))
    driver.add(1, prompt_of(6), max_tokens=24, eos_token_ids=())
    driver.add(2, prompt_of(6), max_tokens=25, eos_token_ids=())
    driver.run()
    for request_id, finish in ((1, LENGTH), (2, CONTEXT_LIMIT)):
        assert driver.results[request_id, 0].finish == finish
        assert driver.results[request_id, 0].tokens == answer(prompt_of(6), 24, eos=())


def test_parameters_travel_once_when_the_row_is_assigned() -> None:
    driver = Driver(make_scheduler())
    driver.add(
        7,
        prompt_of(9),
        max_tokens=4,
        min_tokens=2,
        eos_token_ids=(30, 31),
        stop_token_ids=(31, 32),
        temperature=0.5,
        top_p=0.25,
        min_p=0.125,
        top_k=5,
        seed=2**63 + 5,
        num_logprobs=3,
    )
    plan = driver.plan()
    assert plan is not None
    features = arena.S_RANDOM | arena.S_TOP_K | arena.S_TOP_P | arena.S_MIN_P
    assert plan.features == features | arena.S_MIN_TOKENS
    assert plan.max_logprobs == 3
    record = driver.device.params[0]
    floats = record.view(np.float32)
    assert (floats[arena.P_TEMPERATURE], floats[arena.P_TOP_P], floats[arena.P_MIN_P]) == (
        0.5,
        0.25,
        0.125,
    )
    assert floats[arena.P_REPETITION] == 1.0
    assert record[arena.P_TOP_K] == 5
    assert (record[arena.P_SEED_LOW], record[arena.P_SEED_HIGH]) == (5, -(2**31))
    assert (record[arena.P_MIN_LEN], record[arena.P_PROMPT_LEN], record[arena.P_NUM_LOGPROBS]) == (
        11,
        9,
        3,
    )
    assert record[arena.P_NUM_END_IDS] == 3
    assert record[arena.P_END_IDS : arena.P_END_IDS + 3].tolist() == [30, 31, 32]
    later = [driver.plan()]
    while driver.in_flight:
        driver.commit()
        later.append(driver.plan())
    assert [p.features for p in later if p] == [
        features | arena.S_MIN_TOKENS,
        features,
        features,
    ]
    for raw in driver.plans[1:]:
        assert np.frombuffer(raw, np.int32)[arena.H_NUM_PARAM_UPDATES] == 0


def test_greedy_rows_need_no_filters() -> None:
    driver = Driver(make_scheduler())
    driver.add(1, prompt_of(3), temperature=0.0, top_p=0.5, top_k=3)
    plan = driver.plan()
    assert plan is not None
    assert (plan.features, plan.max_logprobs) == (0, -1)


def test_a_second_turn_finds_prompt_and_answer_in_the_cache() -> None:
    driver = Driver(make_scheduler())
    prompt = prompt_of(40)
    driver.add(1, prompt, max_tokens=30, eos_token_ids=())
    driver.run()
    history = prompt + driver.results[1, 0].tokens
    driver.add(2, [*history, 1, 2, 3], max_tokens=3)
    driver.run()
    assert driver.results[2, 0].cached_tokens == (len(history) - 1) // 16 * 16
    assert driver.results[2, 0].tokens == answer([*history, 1, 2, 3], 3)


@pytest.mark.parametrize("same", [1, 15, 16, 17, 40, 47, 48])
def test_reuse_is_exact_to_the_token(same: int) -> None:
    driver = Driver(make_scheduler())
    first = prompt_of(48)
    driver.add(1, first, max_tokens=2)
    driver.run()
    second = first[:same] + [49 - t % 7 for t in first[same:]]
    agree = next((i for i in range(48) if first[i] != second[i]), 48)
    driver.add(2, second, max_tokens=4)
    driver.run()
    assert driver.results[2, 0].cached_tokens == min(agree, 47)
    assert driver.results[2, 0].tokens == answer(second, 4)


def test_salts_bypass_and_a_flushed_cache_share_nothing() -> None:
    driver = Driver(make_scheduler())
    prompt = prompt_of(48)
    for i, options in enumerate(
        [{"salt": "a"}, {"salt": "b"}, {}, {"bypass_cache": True}, {"salt": "a"}]
    ):
        driver.add(i, prompt, max_tokens=2, **options)
        driver.run()
    assert [driver.results[i, 0].cached_tokens for i in range(5)] == [0, 0, 0, 0, 47]
    assert driver.scheduler.flush_cache() == 9
    assert driver.scheduler.stats()["blocks_cached"] == 0
    driver.add(9, prompt, max_tokens=2)
    driver.run()
    assert driver.results[9, 0].cached_tokens == 0


def test_long_salts_that_differ_at_their_ends_share_nothing() -> None:
    driver = Driver(make_scheduler())
    company = "a company with a long name, department "
    for i, salt in enumerate([company + "1", company + "2", "1" + company, company + "1"]):
        driver.add(i, prompt_of(48), max_tokens=2, salt=salt)
        driver.run()
    assert [driver.results[i, 0].cached_tokens for i in range(4)] == [0, 0, 0, 47]


def test_equal_prompts_at_once_end_up_sharing_their_blocks() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=64)
    driver = Driver(scheduler)
    for i in range(4):
        driver.add(i, prompt_of(32), max_tokens=40, eos_token_ids=())
    for _ in range(8):
        driver.step()
    stats = scheduler.stats()
    assert stats["folded_blocks"] >= 1
    used = int(stats["blocks_total"] - stats["blocks_free"])
    assert used <= 2 + 4
    driver.run()
    for i in range(4):
        assert driver.results[i, 0].tokens == answer(prompt_of(32), 40, eos=())


def test_a_folded_block_stays_until_no_step_reads_it() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=64)
    driver = Driver(scheduler)
    for i in range(2):
        driver.add(i, prompt_of(32), max_tokens=9, eos_token_ids=())
    driver.plan()
    driver.plan()
    used = []
    for _ in range(2):
        driver.commit()
        used.append(scheduler.stats()["blocks_total"] - scheduler.stats()["blocks_free"])
    assert scheduler.stats()["folded_blocks"] == 2
    assert used == [2 + 2 + 2, 2 + 2]
    driver.run()


def test_no_end_before_min_tokens() -> None:
    full = answer(prompt_of(6), 200, eos=())
    early, late = next((i, j) for i in range(4) for j in range(4, 200) if full[i] == full[j])
    driver = Driver(make_scheduler())
    driver.add(
        1,
        prompt_of(6),
        max_tokens=200,
        min_tokens=4,
        eos_token_ids=(),
        stop_token_ids=(full[early],),
    )
    driver.run()
    assert driver.results[1, 0].tokens == full[: late + 1]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_full_pool_preempts_and_every_answer_is_right(overlap: bool) -> None:
    scheduler = make_scheduler(num_blocks=13)
    driver = Driver(scheduler, num_blocks=13, overlap=overlap)
    for i in range(8):
        driver.add(i, prompt_of(20, i), max_tokens=100, eos_token_ids=())
    driver.run()
    for i in range(8):
        assert driver.results[i, 0].tokens == answer(prompt_of(20, i), 100, eos=())
    assert scheduler.stats()["preemptions"] > 0


def test_a_preempted_request_counts_once_among_those_that_ask_the_cache() -> None:
    scheduler = make_scheduler(num_blocks=13)
    driver = Driver(scheduler, num_blocks=13)
    for i in range(8):
        driver.add(i, prompt_of(20, i), max_tokens=100, eos_token_ids=())
    driver.run()
    assert scheduler.stats()["preemptions"] > 0
    assert scheduler.stats()["query_tokens"] == 8 * 20


def test_a_prompt_leaves_the_blocks_that_a_running_one_still_needs() -> None:
    scheduler = make_scheduler(num_blocks=21, max_num_batched_tokens=16)
    driver = Driver(scheduler, num_blocks=21, overlap=False)
    driver.add(1, prompt_of(240), max_tokens=2, eos_token_ids=())  # 15 of 20 blocks
    driver.add(2, prompt_of(160, 2), max_tokens=2, eos_token_ids=())  # 10
    for _ in range(3):
        driver.step()
    assert scheduler.stats()["running"] == 1
    driver.run()
    assert scheduler.stats()["preemptions"] == 0


def test_a_sequence_that_outgrows_the_pool_alone_ends() -> None:
    driver = Driver(make_scheduler(num_blocks=4), num_blocks=4)
    driver.add(1, prompt_of(40), max_tokens=100, eos_token_ids=())
    driver.run()
    assert driver.results[1, 0].finish == CONTEXT_LIMIT
    assert driver.results[1, 0].tokens == answer(prompt_of(40), 9, eos=())


def test_abort_at_every_point_of_the_overlap() -> None:
    for turns in range(12):
        driver = Driver(make_scheduler(max_num_batched_tokens=16))
        driver.add(1, prompt_of(40), max_tokens=20, eos_token_ids=())
        driver.add(2, prompt_of(30, 2), max_tokens=20, eos_token_ids=())
        for turn in range(turns):
            if turn % 2 or len(driver.in_flight) == 0:
                driver.plan()
            else:
                driver.commit()
        assert driver.scheduler.abort(1)
        assert not driver.scheduler.abort(1)
        driver.run()
        assert driver.results[1, 0].finish == ABORTED
        assert driver.results[2, 0].tokens == answer(prompt_of(30, 2), 20, eos=())
        assert driver.scheduler.stats()["blocks_free"] == 63


def test_many_ends_between_two_polls_are_all_reported() -> None:
    driver = Driver(make_scheduler(), check=False)
    for request_id in range(1000):
        driver.add(request_id, prompt_of(3))
        assert driver.scheduler.abort(request_id)
    driver.poll()
    assert [driver.results[i, 0].finish for i in range(1000)] == [ABORTED] * 1000
    assert not driver.scheduler.has_work()


@pytest.mark.parametrize("overlap", [False, True])
def test_timeouts(overlap: bool) -> None:
    driver = Driver(make_scheduler(max_num_seqs=1), overlap=overlap)
    driver.add(1, prompt_of(10), max_tokens=100, eos_token_ids=(), time_limit=20.0)
    driver.add(2, prompt_of(10, 2), queue_timeout=5.0, time_limit=7.0)
    driver.add(3, prompt_of(10, 3), time_limit=7.0)
    driver.step()
    for _ in range(5):
        driver.step()
    assert driver.results[2, 0].finish == QUEUE_TIMEOUT
    driver.run()
    assert driver.results[3, 0].finish == TIME_LIMIT
    assert driver.results[1, 0].finish == TIME_LIMIT
    assert 10 < len(driver.results[1, 0].tokens) < 20


def test_a_second_queue_timeout_is_noticed_too() -> None:
    driver = Driver(make_scheduler(max_num_seqs=1))
    driver.add(1, prompt_of(10), max_tokens=60, eos_token_ids=())
    driver.add(2, prompt_of(10, 2), queue_timeout=5.0)
    driver.add(3, prompt_of(10, 3), queue_timeout=9.0)
    ends: dict[int, float] = {}
    while len(ends) < 2:
        driver.step()
        for i in (2, 3):
            if driver.results[i, 0].finish:
                ends.setdefault(i, driver.now)
    assert not driver.results[1, 0].finish
    assert driver.results[2, 0].finish == driver.results[3, 0].finish == QUEUE_TIMEOUT
    assert (ends[2], ends[3]) == (pytest.approx(5.0, abs=1.0), pytest.approx(9.0, abs=1.0))


def test_logits_that_are_not_finite_end_their_request_alone() -> None:
    driver = Driver(make_scheduler())
    driver.add(1, prompt_of(5), max_tokens=9, eos_token_ids=())
    driver.add(2, prompt_of(5, 2), max_tokens=9, eos_token_ids=())
    driver.plan()
    driver.in_flight[0][1][0] = -1
    driver.run()
    assert (driver.results[1, 0].finish, driver.results[1, 0].tokens) == (ERROR, [])
    assert driver.results[2, 0].tokens == answer(prompt_of(5, 2), 9, eos=())


def test_refusals_name_the_field() -> None:
    scheduler = make_scheduler(num_blocks=8, max_model_len=256)
    driver = Driver(scheduler)
    driver.add(1, prompt_of(3))
    with pytest.raises(RequestExists, match="request_id: 1"):
        driver.add(1, prompt_of(3))
    with pytest.raises(InvalidRequest, match="prompt: is empty"):
        driver.add(2, [])
    with pytest.raises(InvalidRequest, match="has 113 tokens, but the KV cache holds 112"):
        driver.add(2, prompt_of(113))
    with pytest.raises(InvalidRequest, match=r"stopping\.max_tokens: is 0"):
        driver.add(2, prompt_of(3), max_tokens=0)
    with pytest.raises(InvalidRequest, match=r"stopping\.stop_token_ids: .* not 19"):
        driver.add(2, prompt_of(3), min_tokens=1, stop_token_ids=tuple(range(1, 19)))
    driver.add(2, prompt_of(3), stop_token_ids=tuple(range(60, 90)))
    with pytest.raises(ConfigError, match="policy is 'best'"):
        make_scheduler(policy="best")
    driver.run()


def test_a_prompt_leaves_room_for_one_token_of_its_answer() -> None:
    driver = Driver(make_scheduler(max_model_len=256))
    with pytest.raises(InvalidRequest, match=r"prompt: has 256 tokens, .* may have 256 at most"):
        driver.add(1, prompt_of(256))
    driver.add(1, prompt_of(255))
    driver.run()
    assert driver.results[1, 0].tokens == answer(prompt_of(255), 1)


def test_queue_limits() -> None:
    scheduler = make_scheduler(max_queued_requests=2)
    driver = Driver(scheduler)
    driver.add(1, prompt_of(3))
    driver.add(2, prompt_of(3))
    with pytest.raises(Overloaded, match="max_queued_requests"):
        driver.add(3, prompt_of(3))
    driver.run()
    driver = Driver(make_scheduler(max_queued_tokens=10))
    driver.add(1, prompt_of(20))
    with pytest.raises(Overloaded, match="max_queued_tokens"):
        driver.add(2, prompt_of(1))
    driver.run()


def test_waiting_tokens_may_fill_the_queue_to_its_limit() -> None:
    driver = Driver(make_scheduler(max_queued_tokens=10))
    driver.add(1, prompt_of(5))
    driver.add(2, prompt_of(5, 2))
    with pytest.raises(Overloaded, match="max_queued_tokens"):
        driver.add(3, prompt_of(1))
    driver.run()


def test_cached_tokens_do_not_fill_the_queue() -> None:
    scheduler = make_scheduler(max_queued_tokens=40)
    driver = Driver(scheduler)
    prompt = prompt_of(100)
    driver.add(1, prompt)
    driver.run()
    for request_id in range(2, 10):
        driver.add(request_id, prompt)
    waiting = scheduler.stats()["waiting_tokens"]
    assert waiting < 40, f"{waiting} of 800 tokens are not cached"
    scheduler.check()
    with pytest.raises(Overloaded, match="max_queued_tokens"):
        driver.add(10, prompt, salt="another's")
    scheduler.check()
    driver.run()
    assert scheduler.stats()["waiting_tokens"] == 0


def test_who_bypasses_the_cache_waits_with_all_tokens() -> None:
    driver = Driver(make_scheduler())
    driver.add(1, prompt_of(100))
    driver.run()
    driver.add(2, prompt_of(100), bypass_cache=True)
    assert driver.scheduler.stats()["waiting_tokens"] == 100
    driver.run()


def test_a_wrong_arena_or_a_wrong_order_of_commits_is_refused() -> None:
    scheduler = make_scheduler()
    driver = Driver(scheduler)
    driver.add(1, prompt_of(3))
    with pytest.raises(ValueError, match="arena must be int32"):
        scheduler.plan(0.0, np.zeros(8, np.int32))
    driver.plan()
    driver.plan()
    with pytest.raises(ValueError, match="not the oldest"):
        scheduler.commit(driver.in_flight[1][0], driver.in_flight[1][1], 0.0)
    with pytest.raises(ValueError, match="tokens must be int32"):
        scheduler.commit(driver.in_flight[0][0], np.zeros(0, np.int32), 0.0)
    driver.run()


OUT_OF_MEMORY = """
import resource, numpy as np
from zllm.native.scheduler import Scheduler
scheduler = Scheduler(
    num_blocks=64, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=2**29
)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
prompt = np.ones(20, np.int32)
for count in (1, 3):
    try:
        scheduler.add(1, prompt, now=0.0, max_tokens=2**29, num_sequences=count)
    except MemoryError as error:
        print(error)
    scheduler.check()
    assert not scheduler.has_work()
scheduler.add(1, prompt, now=0.0, max_tokens=9)
scheduler.check()
"""


@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="AddressSanitizer's own memory is beyond any limit of the address space",
)
def test_a_request_too_large_for_memory_is_refused_and_leaves_no_trace() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.count("no memory for") == 2


def test_the_time_between_tokens_is_counted_by_length() -> None:
    scheduler = make_scheduler()
    driver = Driver(scheduler, overlap=False)
    driver.now = 100.0
    driver.add(1, prompt_of(4), max_tokens=4, eos_token_ids=())
    for seconds in (7.0, 0.0004, 0.0007, 50.0):
        driver.plan()
        driver.now += seconds
        driver.commit()
    bounds, counts, total = scheduler.inter_token()
    found = dict(zip([*bounds, math.inf], counts, strict=True))
    assert {bound for bound, count in found.items() if count} == {0.0005, 0.001, math.inf}
    assert sum(counts) == 3
    assert total == pytest.approx(50.0011)
    assert list(bounds) == sorted(bounds)


def test_a_first_token_comes_with_the_times_in_the_queue_and_in_prefill() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    arena_of_step = np.zeros(scheduler.arena_words, np.int32)
    scheduler.add(1, np.array(prompt_of(20), np.int32), now=100.0, max_tokens=2)
    for now, started in ((103.0, []), (104.0, [(1, 0, 3.0, 1.5)]), (105.0, [])):
        plan = scheduler.plan(now, arena_of_step)
        assert plan is not None
        tokens = np.ones(plan.num_rows, np.int32)
        assert scheduler.commit(plan, tokens, now + 0.5).started == started
