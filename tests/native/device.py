"""A device made of Python lists: it executes arenas and knows which token each KV slot holds.

A slot holds the state of the prefix that its KV was computed from, and the state before it, so a
row that reads a stale, foreign or unwritten slot is found at once. The sampled token is a function
of the prefix and the seed alone: whatever the scheduler did with batches, caching, preemption and
overlap, a request must get the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from zllm.native import arena

VOCAB = 50
BLOCK = 16


Slot = tuple[int, int]
"""The state before a token and after it."""


def extend(state: int, token: int) -> int:
    """The state of a prefix after one more token; that of the empty one is 0."""
    return (state * 1000003 + token + 1) % (2**61 - 1)


def sample(state: int, seed: int = 0, vocab: int = VOCAB) -> int:
    """The model: any function of the prefix and the seed will do."""
    return (state + 7919 * seed) % 1009 % vocab


def next_token(prefix: tuple[int, ...], seed: int = 0) -> int:
    """The token that the model gives after a prefix."""
    state = 0
    for token in prefix:
        state = extend(state, token)
    return sample(state, seed)


@dataclass
class Device:
    """Executes steps in order, one at a time, as a stream does."""

    max_num_seqs: int
    num_blocks: int
    vocab: int = VOCAB
    slots: dict[int, Slot] = field(default_factory=dict)
    host: dict[int, list[Slot | None]] = field(default_factory=dict)
    table: dict[int, dict[int, int]] = field(default_factory=dict)
    params: dict[int, npt.NDArray[np.int32]] = field(default_factory=dict)
    last_token: dict[int, int] = field(default_factory=dict)
    tokens_computed: int = 0

    def run(self, words: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Execute one arena; the sampled token of each row (0 where none is sampled)."""

        def section(offset: int, length: int) -> npt.NDArray[np.int32]:
            start = int(words[offset])
            assert arena.HEADER_WORDS <= start <= start + length <= words[arena.H_NUM_WORDS]
            return words[start : start + length]

        num_rows, num_tokens = int(words[arena.H_NUM_ROWS]), int(words[arena.H_NUM_TOKENS])
        rows = section(arena.H_ROWS, num_rows)
        q_start = section(arena.H_Q_START, num_rows + 1)
        kv_len = section(arena.H_KV_LEN, num_rows)
        flags = section(arena.H_FLAGS, num_rows)
        tokens = section(arena.H_TOKENS, num_tokens)
        updates = section(arena.H_TABLE_UPDATES, 3 * int(words[arena.H_NUM_TABLE_UPDATES])).reshape(
            -1, 3
        )
        params = section(
            arena.H_PARAM_UPDATES, arena.PARAM_WORDS * int(words[arena.H_NUM_PARAM_UPDATES])
        ).reshape(-1, arena.PARAM_WORDS)
        self._copy(words, section)
        for row, index, block in updates:
            assert 0 < block < self.num_blocks
            assert 0 <= row < self.max_num_seqs
            self.table.setdefault(int(row), {})[int(index)] = int(block)
        for record in params:
            self.params[int(record[arena.P_ROW])] = record.copy()
        assert len(set(rows.tolist())) == num_rows, "a row stands twice in a step"
        assert q_start[num_rows] == num_tokens
        assert (np.diff(q_start)[: int(words[arena.H_NUM_DECODES])] == 1).all()
        states = [
            self._write(
                int(rows[r]),
                int(kv_len[r]),
                tokens[q_start[r] : q_start[r + 1]].tolist(),
                int(flags[r]),
            )
            for r in range(num_rows)
        ]
        sampled = np.zeros(num_rows, np.int32)
        for r in range(num_rows):
            length = int(kv_len[r] + q_start[r + 1] - q_start[r])
            self._verify(int(rows[r]), length)
            if flags[r] & arena.F_SAMPLE:
                sampled[r] = sample(states[r], self._seed(int(rows[r])), self.vocab)
                self.last_token[int(rows[r])] = int(sampled[r])
        self.tokens_computed += num_tokens
        assert int(words[arena.H_NUM_SAMPLED]) == int(((flags & arena.F_SAMPLE) != 0).sum())
        return sampled

    def _copy(self, words: npt.NDArray[np.int32], section: Any) -> None:
        """Swaps out, then in, then block copies; each reads before the next writes."""
        for source, target in section(
            arena.H_SWAP_OUT, 2 * int(words[arena.H_NUM_SWAP_OUT])
        ).reshape(-1, 2):
            self.host[int(target)] = self._block(int(source))
        for source, target in section(arena.H_SWAP_IN, 2 * int(words[arena.H_NUM_SWAP_IN])).reshape(
            -1, 2
        ):
            self._fill(int(target), self.host[int(source)])
        pairs = section(arena.H_COPIES, 2 * int(words[arena.H_NUM_COPIES])).reshape(-1, 2)
        contents = [self._block(int(source)) for source, _ in pairs]
        for (_, target), content in zip(pairs, contents, strict=True):
            self._fill(int(target), content)

    def _block(self, block: int) -> list[Slot | None]:
        return [self.slots.get(block * BLOCK + i) for i in range(BLOCK)]

    def _fill(self, block: int, content: list[Slot | None]) -> None:
        for i, slot in enumerate(content):
            if slot is not None:
                self.slots[block * BLOCK + i] = slot
            else:
                self.slots.pop(block * BLOCK + i, None)

    def _seed(self, row: int) -> int:
        return int(self.params[row][arena.P_SEED_HIGH])

    def _slot(self, row: int, position: int) -> int:
        return self.table[row][position // BLOCK] * BLOCK + position % BLOCK

    def _write(self, row: int, start: int, tokens: list[int], flags: int) -> int:
        """Compute a row's tokens on top of what its table says was computed before."""
        if flags & arena.F_TOKEN_ON_DEVICE:
            assert len(tokens) == 1
            tokens = [self.last_token[row]]
        state = self.slots[self._slot(row, start - 1)][1] if start else 0
        for i, token in enumerate(tokens):
            after = extend(state, token)
            self.slots[self._slot(row, start + i)] = (state, after)
            state = after
        return state

    def _verify(self, row: int, length: int) -> None:
        """Attention reads every slot of the row: each must continue the one before it."""
        table = self.table[row]
        state = 0
        for index in range((length + BLOCK - 1) // BLOCK):
            first = table[index] * BLOCK
            for slot in range(first, first + min(BLOCK, length - index * BLOCK)):
                before, after = self.slots[slot]
                assert before == state, f"row {row} reads a foreign slot in its block {index}"
                state = after
