"""Decides what runs in each step; keeps the books of sequences and blocks (scheduler.pyx)."""

import numpy as np
import numpy.typing as npt

from zllm.native.step_objects import Events, Plan

class Scheduler:
    def __init__(
        self,
        *,
        num_blocks: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        num_host_blocks: int = 0,
        enable_prefix_caching: bool = True,
        policy: str = "fcfs",
        max_queued_requests: int = 4096,
        max_queued_tokens: int = 16777216,
        patience: int = 1024,
        swap_cost: float = 0.0,
    ) -> None:
        """`num_blocks` counts block 0, which belongs to nobody: the cache has exactly so many.
        No policy lets more than `patience` admissions pass over the oldest waiting request.
        `swap_cost`: tokens that are computed in the time in which one block goes to the host and
        back; a preempted sequence is swapped if that is cheaper and host blocks are left.
        Raises ConfigError when a number or the policy cannot work."""
    arena_words: int
    """Length in int32 words that an arena must have for the largest step."""
    def add(
        self,
        request_id: int,
        prompt: npt.NDArray[np.int32],
        *,
        now: float,
        max_tokens: int,
        min_tokens: int = 0,
        eos_token_ids: tuple[int, ...] = (),
        stop_token_ids: tuple[int, ...] = (),
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        num_logprobs: int = -1,
        priority: int = 0,
        salt: str = "",
        bypass_cache: bool = False,
        tenant: str = "",
        queue_timeout: float = 0.0,
        time_limit: float = 0.0,
        num_sequences: int = 1,
    ) -> None:
        """Queue a request. Raises Overloaded when the queue's bounds are reached and
        InvalidRequest when it can never run (longer than the context or the pool); RequestExists
        when the id is in use."""
    def abort(self, request_id: int) -> bool:
        """End a request with FinishReason.ABORTED at the next commit; False when unknown."""
    def fork(self, request_id: int, index: int, token: int) -> int:
        """Add a sequence that has the known tokens of sequence `index`, with `token` in the place
        of the last one: a beam's other continuation. It shares the source's blocks, gets a row of
        its own and goes on by itself; returns its index. For steps that are not overlapped."""
    def plan(self, now: float, arena: npt.NDArray[np.int32]) -> Plan | None:
        """Decide the next step and pack it. None: nothing can run until a commit or an arrival.
        May be called once before the previous plan is committed (one step ahead), no further."""
    def commit(self, plan: Plan, tokens: npt.NDArray[np.int32], now: float) -> Events:
        """Take the sampled token of each row of `plan`, in row order. A row without F_SAMPLE has
        any number of 0 or more; -1 fails a row's sequence, sampled or not: its logits were not
        finite, or the step could not run. Plans are committed in order."""
    def poll(self, now: float) -> Events | None:
        """Finishes that need no step: aborts and timeouts of requests that wait. None: nothing."""
    def has_work(self) -> bool:
        """Whether any request is live."""
    def flush_cache(self) -> int:
        """Drop cached blocks that nothing uses; returns how many."""
    def stats(self) -> dict[str, int]:
        """Plain counters and gauges. Sequences: running, waiting. Tokens: waiting_tokens,
        hit_tokens, query_tokens, generated_tokens, preempted_tokens (computed again).
        Blocks: blocks_total, blocks_free (empty, or cached with no user), blocks_empty,
        blocks_cached, evictions, folded_blocks, host_blocks_free, swapped_blocks. Events:
        admissions, preemptions, swaps_out, swaps_in, forks, steps."""
    def inter_token(self) -> tuple[tuple[float, ...], tuple[int, ...], float]:
        """Of the times between two tokens of one sequence: bounds in seconds, how many were up to
        each bound and above the one before (one count more: those above all), and their sum."""
    def check(self) -> None:
        """Verify every invariant of pool, tree, rows and queues; raises InvariantError."""
