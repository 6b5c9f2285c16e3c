"""The yardstick: one engine step's host work in plain Python, in the manner of nano-vllm's loop.

Sequences and blocks are objects, blocks carry hashes for prefix reuse, and each step's inputs are
built as lists and turned into arrays. It only decodes: that is what is measured.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count

import numpy as np
import numpy.typing as npt

BLOCK_SIZE = 16
_ids = count()


@dataclass
class Block:
    """A block of the cache."""

    block_id: int
    ref_count: int = 0
    hash: int = -1
    token_ids: list[int] = field(default_factory=list)


@dataclass
class Sequence:
    """A request that decodes."""

    token_ids: list[int]
    max_tokens: int
    seq_id: int = field(default_factory=lambda: next(_ids))
    num_prompt_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    finished: bool = False

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_blocks(self) -> int:
        return (len(self.token_ids) + BLOCK_SIZE - 1) // BLOCK_SIZE

    def block(self, index: int) -> list[int]:
        return self.token_ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]


class BlockManager:
    """Hands out blocks and caches the full ones by a chained hash of their tokens."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = [Block(i) for i in range(num_blocks)]
        self.free_block_ids = deque(range(num_blocks))
        self.hash_to_block_id: dict[int, int] = {}

    @staticmethod
    def compute_hash(token_ids: list[int], prefix: int) -> int:
        digest = blake2b(np.array(token_ids, np.int64).tobytes(), digest_size=8)
        if prefix != -1:
            digest.update(prefix.to_bytes(8, "little"))
        return int.from_bytes(digest.digest(), "little")

    def allocate(self, seq: Sequence) -> None:
        prefix = -1
        for index in range(seq.num_blocks):
            block = self.blocks[self.free_block_ids.popleft()]
            block.ref_count = 1
            tokens = seq.block(index)
            if len(tokens) == BLOCK_SIZE:
                prefix = self.compute_hash(tokens, prefix)
                block.hash, block.token_ids = prefix, tokens
                self.hash_to_block_id[prefix] = block.block_id
            seq.block_table.append(block.block_id)

    def can_append(self, seq: Sequence) -> bool:
        return len(self.free_block_ids) >= (len(seq) % BLOCK_SIZE == 1)

    def may_append(self, seq: Sequence) -> None:
        table = seq.block_table
        last = self.blocks[table[-1]]
        if len(seq) % BLOCK_SIZE == 1:
            block = self.blocks[self.free_block_ids.popleft()]
            block.ref_count = 1
            table.append(block.block_id)
        elif len(seq) % BLOCK_SIZE == 0:
            tokens = seq.block(seq.num_blocks - 1)
            prefix = self.blocks[table[-2]].hash if len(table) > 1 else -1
            last.hash = self.compute_hash(tokens, prefix)
            last.token_ids = tokens
            self.hash_to_block_id[last.hash] = last.block_id


class Loop:
    """schedule, prepare, postprocess: what the host does for each step."""

    def __init__(self, num_seqs: int, prompt_len: int, num_blocks: int, max_tokens: int) -> None:
        self.manager = BlockManager(num_blocks)
        self.running: deque[Sequence] = deque()
        self.max_num_seqs = num_seqs
        rng = np.random.default_rng(0)
        for _ in range(num_seqs):
            seq = Sequence(rng.integers(1, 1000, prompt_len).tolist(), max_tokens)
            seq.num_prompt_tokens = prompt_len
            self.manager.allocate(seq)
            self.running.append(seq)

    def schedule(self) -> list[Sequence]:
        scheduled: list[Sequence] = []
        while self.running and len(scheduled) < self.max_num_seqs:
            seq = self.running.popleft()
            if not self.manager.can_append(seq):
                raise MemoryError("the yardstick's pool is too small")
            self.manager.may_append(seq)
            scheduled.append(seq)
        self.running.extendleft(reversed(scheduled))
        return scheduled

    def prepare(self, seqs: list[Sequence]) -> tuple[npt.NDArray[np.int32], ...]:
        input_ids, positions, slot_mapping, context_lens, temperatures = [], [], [], [], []
        for seq in seqs:
            input_ids.append(seq.token_ids[-1])
            positions.append(len(seq) - 1)
            context_lens.append(len(seq))
            slot_mapping.append(seq.block_table[-1] * BLOCK_SIZE + (len(seq) - 1) % BLOCK_SIZE)
            temperatures.append(1.0)
        longest = max(len(seq.block_table) for seq in seqs)
        tables = [seq.block_table + [-1] * (longest - len(seq.block_table)) for seq in seqs]
        return (
            np.array(input_ids, np.int64),
            np.array(positions, np.int64),
            np.array(slot_mapping, np.int32),
            np.array(context_lens, np.int32),
            np.array(temperatures, np.float32),
            np.array(tables, np.int32),
        )

    def postprocess(self, seqs: list[Sequence], token_ids: list[int]) -> list[tuple[int, int]]:
        outputs = []
        for seq, token in zip(seqs, token_ids, strict=True):
            seq.token_ids.append(token)
            if token == 0 or len(seq) - seq.num_prompt_tokens == seq.max_tokens:
                seq.finished = True
            outputs.append((seq.seq_id, token))
        return outputs

    def step(self, token_ids: list[int]) -> None:
        seqs = self.schedule()
        self.prepare(seqs)
        self.postprocess(seqs, token_ids)
