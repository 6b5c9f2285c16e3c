"""The radix tree against an obvious model: a list of cached prefixes, the least recent first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from zllm.native.prefix_cache import PrefixCache

BLOCK = 16
Prefix = tuple[tuple[int, ...], ...]

# Few different blocks, alike in their first tokens: hits, partial hits and siblings are common.
BLOCKS = [(7,) * same + (fill,) * (BLOCK - same) for same in (0, 1, 8, 15) for fill in (1, 2, 9)]


class Model:
    """Prefixes of whole blocks. An insertion touches its prefixes, the longest first."""

    def __init__(self, num_blocks: int) -> None:
        self.room = num_blocks - 1
        self.prefixes: list[Prefix] = []
        self.evictions = 0

    def insert(self, blocks: Prefix) -> int:
        touched: list[Prefix] = []
        added = 0
        for length in range(1, len(blocks) + 1):
            prefix = blocks[:length]
            if prefix in self.prefixes:
                self.prefixes.remove(prefix)
            else:
                if len(self.prefixes) + len(touched) == self.room and not self.evict(blocks):
                    break
                added += 1
            touched.append(prefix)
        self.prefixes += reversed(touched)
        return added

    def evict(self, using: Prefix) -> bool:
        """Forget the least recent prefix that is not in use."""
        for prefix in self.prefixes:
            if prefix != using[: len(prefix)]:
                self.prefixes.remove(prefix)
                self.evictions += 1
                return True
        return False

    def match(self, tokens: list[int]) -> int:
        """The longest common prefix with anything cached, in tokens."""
        best = 0
        for prefix in self.prefixes:
            cached = [token for block in prefix for token in block]
            same = next(
                (i for i, (a, b) in enumerate(zip(cached, tokens, strict=False)) if a != b),
                min(len(cached), len(tokens)),
            )
            best = max(best, same)
        return best


def flat(blocks: Prefix) -> npt.NDArray[np.int32]:
    return np.array([token for block in blocks for token in block], np.int32)


some_blocks = st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=5).map(tuple)


class CacheMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(2, 24))
    def start(self, num_blocks: int) -> None:
        self.cache = PrefixCache(num_blocks)
        self.model = Model(num_blocks)

    @rule(blocks=some_blocks)
    def insert(self, blocks: Prefix) -> None:
        assert self.cache.insert(flat(blocks)) == self.model.insert(blocks)

    @rule(blocks=some_blocks, cut=st.integers(1, 80), change=st.integers(0, 79))
    def match(self, blocks: Prefix, cut: int, change: int) -> None:
        tokens = flat(blocks)[:cut]
        if change < len(tokens):
            tokens[change] = 3
        assert self.cache.match(tokens) == self.model.match(tokens.tolist())

    @rule(count=st.integers(1, 3))
    def evict(self, count: int) -> None:
        """Whoever takes a block and frees it leaves an empty one behind."""
        count = min(count, self.cache.num_empty + self.cache.num_idle)
        for _ in range(count - self.cache.num_empty):
            self.model.evict(())
        blocks = self.cache.take(count)
        assert len(set(blocks.tolist())) == count
        assert 0 not in blocks
        self.cache.release(blocks)

    @invariant()
    def the_books_balance(self) -> None:
        if hasattr(self, "cache"):
            assert self.cache.num_idle == len(self.model.prefixes)
            assert self.cache.num_empty == self.model.room - len(self.model.prefixes)
            assert self.cache.num_evictions == self.model.evictions


class TestCache(CacheMachine.TestCase):  # type: ignore[misc, name-defined]
    settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_more_blocks_than_there_are_give_zero() -> None:
    cache = PrefixCache(4)
    assert sorted(cache.take(5).tolist()) == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("num_leaves", [1, 2, 1000])
def test_many_siblings_are_all_found_and_evicted_oldest_first(num_leaves: int) -> None:
    cache = PrefixCache(num_leaves + 1)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 3, BLOCK, dtype=np.int32) for _ in range(num_leaves)]
    for i, prompt in enumerate(prompts):
        prompt[:4] = [i % 7, i % 11, i % 13, i]
        assert cache.insert(prompt) == 1
    assert all(cache.match(prompt) == BLOCK for prompt in prompts)
    half = num_leaves // 2
    cache.release(cache.take(half))
    assert [cache.match(prompt) == BLOCK for prompt in prompts] == [
        i >= half for i in range(num_leaves)
    ]
