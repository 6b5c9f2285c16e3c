"""Who goes first, who waits, and for how long at most."""

from __future__ import annotations

import pytest

from tests.native.driver import Driver, answer, make_scheduler

POLICIES = ["fcfs", "priority", "sjf", "lpm", "fair"]


def prompt_of(length: int, start: int) -> list[int]:
    return [1 + (start * 13 + i) % 49 for i in range(length)]


def order_of_first_tokens(driver: Driver) -> list[int]:
    """Request ids in the order in which their first tokens come."""
    order: list[int] = []
    for _ in range(2000):
        if not driver.scheduler.has_work():
            return order
        driver.step()
        order += [
            request
            for (request, _), result in driver.results.items()
            if result.tokens and request not in order
        ]
    raise AssertionError("work is left")


def one_at_a_time(policy: str, **options: object) -> Driver:
    scheduler = make_scheduler(max_num_seqs=1, policy=policy, **options)
    return Driver(scheduler, max_num_seqs=1, overlap=False)


def test_fcfs_serves_in_the_order_of_arrival() -> None:
    driver = one_at_a_time("fcfs")
    for i, length in enumerate([30, 10, 20]):
        driver.add(i, prompt_of(length, i), max_tokens=2, priority=i)
    assert order_of_first_tokens(driver) == [0, 1, 2]


def test_priority_serves_the_highest_first() -> None:
    driver = one_at_a_time("priority")
    for i, priority in enumerate([0, 2, 1, 2]):
        driver.add(i, prompt_of(10, i), max_tokens=2, priority=priority)
    assert order_of_first_tokens(driver) == [1, 3, 2, 0]


def test_sjf_serves_the_shortest_prompt_first() -> None:
    driver = one_at_a_time("sjf")
    for i, length in enumerate([30, 10, 20]):
        driver.add(i, prompt_of(length, i), max_tokens=2)
    assert order_of_first_tokens(driver) == [1, 2, 0]


def test_sjf_serves_equal_prompts_in_the_order_of_arrival() -> None:
    driver = one_at_a_time("sjf")
    for i in range(3):
        driver.add(i, prompt_of(20, i), max_tokens=2)
    assert order_of_first_tokens(driver) == [0, 1, 2]


def test_sjf_does_not_count_what_is_cached() -> None:
    driver = one_at_a_time("sjf")
    shared = prompt_of(60, 7)
    driver.add(0, shared, max_tokens=2)
    driver.run()
    driver.add(1, prompt_of(30, 3), max_tokens=2)
    driver.add(2, [*shared, 1, 2], max_tokens=2)
    order = order_of_first_tokens(driver)
    assert [request for request in order if request] == [2, 1]


def test_lpm_serves_the_longest_cached_prefix_first() -> None:
    driver = one_at_a_time("lpm")
    shared = prompt_of(40, 7)
    driver.add(0, shared, max_tokens=2)
    driver.run()
    driver.add(1, prompt_of(40, 3), max_tokens=2)
    driver.add(2, shared[:20] + prompt_of(20, 3), max_tokens=2)
    driver.add(3, [*shared, 1, 2], max_tokens=2)
    order = order_of_first_tokens(driver)
    assert [request for request in order if request] == [3, 2, 1]


def test_lpm_does_not_favour_who_bypasses_the_cache() -> None:
    driver = one_at_a_time("lpm")
    shared = prompt_of(40, 7)
    driver.add(0, shared, max_tokens=2)
    driver.run()
    driver.add(1, prompt_of(30, 3), max_tokens=2)
    driver.add(2, [*shared, 5], max_tokens=2, bypass_cache=True)
    order = order_of_first_tokens(driver)
    assert [request for request in order if request] == [1, 2]


def test_fair_lets_a_quiet_tenant_pass_a_flood() -> None:
    driver = one_at_a_time("fair", max_model_len=1024, num_blocks=256)
    for i in range(30):
        driver.add(i, prompt_of(600, i), max_tokens=2, tenant="loud", bypass_cache=True)
    for i in range(30, 33):
        driver.add(i, prompt_of(600, i), max_tokens=2, tenant="quiet", bypass_cache=True)
    order = order_of_first_tokens(driver)
    # A tenant gets at most a quantum of 4,096 tokens ahead, and one request beyond.
    assert max(order.index(i) for i in range(30, 33)) <= 4096 // 600 + 1 + 3
    assert [request for request in order if request >= 30] == [30, 31, 32]


def test_fair_shares_tokens_by_tenant_not_by_request() -> None:
    driver = one_at_a_time("fair", max_model_len=1024, num_blocks=256)
    for i in range(60):
        driver.add(2 * i, prompt_of(900, i), max_tokens=2, tenant="big", bypass_cache=True)
        driver.add(2 * i + 1, prompt_of(100, i), max_tokens=2, tenant="small", bypass_cache=True)
    served = {0: 0, 1: 0}
    for request in order_of_first_tokens(driver)[:60]:
        served[request % 2] += 100 if request % 2 else 900
        assert abs(served[0] - served[1]) <= 2 * (4096 + 900)


def test_fair_counts_the_tokens_of_answers() -> None:
    driver = one_at_a_time("fair")
    for i in range(30):
        driver.add(i, prompt_of(10, i), max_tokens=200, eos_token_ids=(), tenant="talks")
    driver.add(30, prompt_of(10, 30), max_tokens=1, tenant="listens")
    while not driver.results[30, 0].tokens:
        driver.step()
    served = sum(bool(driver.results[i, 0].tokens) for i in range(30))
    assert served <= 4096 // 200 + 1


def test_fair_does_not_count_what_is_cached() -> None:
    driver = one_at_a_time("fair", max_model_len=1024, num_blocks=256)
    shared = prompt_of(600, 7)
    driver.add(0, shared, max_tokens=1, tenant="a")
    driver.run()
    for i in range(1, 31):  # several quanta, if it were computed
        driver.add(i, shared, max_tokens=1, tenant="a")
    driver.add(31, prompt_of(20, 5), max_tokens=1, tenant="b")
    assert order_of_first_tokens(driver)[-1] == 31


def test_fair_lets_nobody_save_up_more_than_a_quantum() -> None:
    driver = one_at_a_time("fair", max_model_len=1024, num_blocks=256)
    options = {"max_tokens": 1, "bypass_cache": True}
    driver.add(0, prompt_of(5, 0), tenant="idle", **options)
    for i in range(1, 31):
        driver.add(i, prompt_of(900, i), tenant="busy", **options)
    driver.run()
    for i in range(100, 130):
        driver.add(i, prompt_of(900, i), tenant="idle", **options)
    driver.add(200, prompt_of(900, 200), tenant="busy", **options)
    order = [request for request in order_of_first_tokens(driver) if request >= 100]
    assert order.index(200) <= 2 * (4096 // 900 + 1)


def test_fair_keeps_prefix_locality_within_a_tenant() -> None:
    driver = one_at_a_time("fair")
    shared = prompt_of(40, 7)
    driver.add(0, shared, max_tokens=2, tenant="a")
    driver.run()
    driver.add(1, prompt_of(40, 3), max_tokens=2, tenant="a")
    driver.add(2, [*shared, 5], max_tokens=2, tenant="a")
    assert order_of_first_tokens(driver)[1:] == [2, 1]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("patience", [0, 1, 7])
def test_no_policy_starves_a_request(policy: str, patience: int) -> None:
    """The bound of policy.pyx: at most patience + n others before a request with n older ones."""
    driver = one_at_a_time(policy, patience=patience)
    favoured = prompt_of(20, 9)
    driver.add(0, favoured, max_tokens=2, priority=9, tenant="b")
    driver.run()
    older = 3
    for i in range(1, older + 1):
        driver.add(i, prompt_of(30, i), max_tokens=2, priority=0, tenant="a")
    victim = older + 1
    driver.add(victim, prompt_of(60, 20), max_tokens=2, priority=-5, tenant="a")
    before = int(driver.scheduler.stats()["admissions"])
    next_id = 100
    while not driver.results[victim, 0].tokens:
        for _ in range(2):  # arrivals outrun the service
            driver.add(next_id, [*favoured, 3], max_tokens=1, priority=9, tenant=f"t{next_id}")
            next_id += 1
        driver.step()
        admitted = int(driver.scheduler.stats()["admissions"]) - before
        assert admitted <= patience + older + 1, "passed over too often"


def test_a_giant_prompt_does_not_hold_back_short_ones() -> None:
    scheduler = make_scheduler(num_blocks=600, max_model_len=9000, max_num_batched_tokens=64)
    driver = Driver(scheduler, num_blocks=600, overlap=False, check=False)
    driver.add(0, prompt_of(8, 1), max_tokens=400, eos_token_ids=())
    driver.step()
    driver.add(1, prompt_of(8000, 2), max_tokens=1)
    for _ in range(3):
        driver.step()
    for i in range(2, 6):
        driver.add(i, prompt_of(20, i), max_tokens=1)
        for _ in range(2):
            driver.step()
        assert driver.results[i, 0].tokens == answer(prompt_of(20, i), 1)
    assert not driver.results[1, 0].tokens, "the giant prompt is still on its way"


def test_a_flood_of_short_prompts_does_not_hold_back_a_giant_one() -> None:
    driver = Driver(make_scheduler(), overlap=False, check=False)
    driver.add(0, prompt_of(200, 2), max_tokens=1)
    for i in range(1, 100):
        driver.add(i, prompt_of(30, i), max_tokens=1, bypass_cache=True)
    assert order_of_first_tokens(driver).index(0) < 20


def test_no_decode_waits_longer_than_one_chunk() -> None:
    scheduler = make_scheduler(num_blocks=600, max_model_len=9000, max_num_batched_tokens=64)
    driver = Driver(scheduler, num_blocks=600, overlap=False, check=False)
    for i in range(4):
        driver.add(i, prompt_of(8, i), max_tokens=200, eos_token_ids=())
    driver.step()
    driver.add(9, prompt_of(6000, 2), max_tokens=1)
    for _ in range(90):
        plan = driver.plan()
        assert plan is not None
        assert plan.num_decodes == 4
        assert plan.num_tokens == 64
        driver.commit()


def test_giants_advance_side_by_side() -> None:
    scheduler = make_scheduler(num_blocks=200, max_model_len=2000, max_num_batched_tokens=64)
    driver = Driver(scheduler, num_blocks=200, overlap=False, check=False)
    driver.add(0, prompt_of(1500, 1), max_tokens=1)
    driver.add(1, prompt_of(500, 2), max_tokens=1)
    order = order_of_first_tokens(driver)
    assert order == [1, 0]
