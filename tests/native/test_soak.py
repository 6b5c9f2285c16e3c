"""Random loads: all answers are right, no block is lost, and the seed decides the schedule."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.native.scenario import Scenario

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("seed", range(24))
def test_random_loads_are_served_right(seed: int) -> None:
    scenario = Scenario(seed)
    for _ in range(150):
        scenario.turn()
    scenario.finish()


@pytest.mark.slow
def test_a_hundred_thousand_steps_without_a_violation() -> None:
    steps = 0
    for seed in range(1000, 100000):
        scenario = Scenario(seed)
        for _ in range(400):
            scenario.turn()
        scenario.finish()
        steps += int(scenario.driver.scheduler.stats()["steps"])
        if steps >= 100000:
            return
    raise AssertionError("the scenarios were too short")


def test_the_same_seed_gives_the_same_schedule_in_every_process() -> None:
    digests = set()
    for hash_seed in ("0", "1", "4242"):
        done = subprocess.run(
            [sys.executable, "-m", "tests.native.scenario", "7"],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        digests.add(done.stdout.strip())
    assert len(digests) == 1
    assert len(digests.pop()) == 64
