"""A random load that uses everything at once, made from a seed alone."""

from __future__ import annotations

import hashlib
import random
import sys
from contextlib import suppress
from dataclasses import dataclass, field

from tests.native.driver import Driver, answer, make_scheduler
from zllm.errors import InvalidRequest

POLICIES = ["fcfs", "priority", "sjf", "lpm", "fair"]
CONTEXT_LIMIT = 4
FINISHED_EARLY = {4, 5, 6, 100}
"""Context limit (the pool may be smaller), time limit, abort, queue timeout."""


@dataclass
class Scenario:
    """Arrivals, aborts, timeouts, forks, preemptions and swaps at random moments."""

    seed: int
    rng: random.Random = field(init=False)
    driver: Driver = field(init=False)
    wanted: dict[int, tuple[list[int], int, int]] = field(default_factory=dict)
    num_host_blocks: int = 0
    num_slots: int = 0

    def __post_init__(self) -> None:
        self.rng = rng = random.Random(self.seed)
        num_blocks = rng.choice([6, 10, 20, 40, 64])
        max_num_seqs = rng.choice([1, 3, 8])
        self.num_slots = 16 * (num_blocks - 1)
        self.num_host_blocks = rng.choice([0, 0, 5, 50])
        scheduler = make_scheduler(
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=rng.choice([4, 16, 33, 64]),
            enable_prefix_caching=rng.random() < 0.8,
            policy=rng.choice(POLICIES),
            num_host_blocks=self.num_host_blocks,
            patience=rng.choice([0, 3, 1000]),
        )
        self.driver = Driver(
            scheduler,
            max_num_seqs=max_num_seqs,
            num_blocks=num_blocks,
            overlap=rng.random() < 0.7,
        )
        self.prefixes = [
            [rng.randrange(1, 50) for _ in range(rng.choice([5, 16, 40, 70]))] for _ in range(4)
        ]

    def turn(self) -> None:
        """One turn of the loop, perhaps with an arrival or an abort before it."""
        if self.rng.random() < 0.3:
            self.arrive()
        if self.wanted and self.rng.random() < 0.05:
            self.driver.scheduler.abort(self.rng.randrange(len(self.wanted)))
        self.driver.step()

    def arrive(self) -> None:
        rng = self.rng
        prompt = rng.choice(self.prefixes)[: rng.randrange(1, 80)]
        prompt = prompt + [rng.randrange(1, 50) for _ in range(rng.randrange(0, 30))]
        max_tokens = rng.choice([1, 2, 8, 40, 300])
        num_sequences = rng.choice([1, 1, 1, 2, 4])
        request_id = len(self.wanted)
        options = {
            "max_tokens": max_tokens,
            "num_sequences": num_sequences,
            "priority": rng.randrange(3),
            "tenant": rng.choice("abc"),
            "salt": rng.choice(["", "", "x"]),
            "bypass_cache": rng.random() < 0.2,
            "queue_timeout": rng.choice([0, 0, 0, 20]),
            "time_limit": rng.choice([0, 0, 0, 30]),
        }
        with suppress(InvalidRequest):  # the prompt may be larger than the pool
            self.driver.add(request_id, prompt, **options)
            self.wanted[request_id] = (prompt, max_tokens, num_sequences)

    def finish(self) -> None:
        """Let all that is live end; then everybody has what was asked for, and nobody a block."""
        self.driver.run(30000)
        for request_id, (prompt, max_tokens, num_sequences) in self.wanted.items():
            for index in range(num_sequences):
                right = answer(prompt, max_tokens, index)
                result = self.driver.results[request_id, index]
                assert result.finish, "a sequence without an end"
                if result.finish == CONTEXT_LIMIT:
                    length = len(prompt) + len(result.tokens)
                    assert length == 256 or length > self.num_slots
                if result.finish in FINISHED_EARLY:
                    assert result.tokens == right[: len(result.tokens)]
                else:
                    assert result.tokens == right
        stats = self.driver.scheduler.stats()
        assert stats["blocks_free"] == stats["blocks_total"]
        assert stats["host_blocks_free"] == self.num_host_blocks
        assert stats["blocks_cached"] == self.driver.scheduler.flush_cache()

    def digest(self) -> str:
        """What the device was told, in a few characters."""
        return hashlib.sha256(b"".join(self.driver.plans)).hexdigest()


def main() -> None:
    scenario = Scenario(int(sys.argv[1]))
    for _ in range(200):
        scenario.turn()
    scenario.finish()
    print(scenario.digest())


if __name__ == "__main__":
    main()
