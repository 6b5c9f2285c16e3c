"""What surrounds the model's layers in a step on the GPU: the arena's expansion, and sampling.

All buffers are as large as the largest step and stay where they are, so that graphs of every size
share them. Nothing here reads a real size on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zllm.cuda import batch as batch_kernels
from zllm.cuda import blocks, sampler
from zllm.cuda.attention import PagedAttention
from zllm.cuda.compiler import Program
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.logit_chunks import LogitChunks
from zllm.native import arena as layout
from zllm.native.step_objects import Plan
from zllm.runtime.kv_cache import KVCache
from zllm.runtime.ops import Batch, Logits, Sampled
from zllm.runtime.row_tables import RowTables

_MANY_TOKENS = 4096
"""Of a step: from here on the samples are a step of their own, too (runtime.ops.Batch)."""
EDITS = layout.S_MIN_TOKENS | layout.S_PENALTIES | layout.S_BIAS
"""Features that change the logits before they are sampled."""


class CudaStep:
    """The device's buffers of one engine."""

    def __init__(
        self,
        kernels: KernelLibrary,
        tables: RowTables,
        attention: PagedAttention,
        *,
        max_tokens: int,
        max_samples: int,
        hidden_size: int,
        vocab_size: int,
        dtype: torch.dtype,
    ) -> None:
        self._kernels = kernels
        self._attention = attention
        self._device = torch.device("cuda", kernels.device)
        self._tables = batch_kernels.BatchTables(
            tables.block_table, tables.params, tables.last_token
        )
        self._expand = batch_kernels.BatchExpander(kernels, layout.MACROS)
        self._batch = batch_kernels.allocate(max_tokens, max_samples, max_samples, kernels.device)
        self._sampler = sampler.Sampler(kernels, layout.MACROS, dtype, vocab_size, max_samples)
        self._one_each = torch.arange(max_samples + 1, dtype=torch.int32, device=self._device)
        self._tokens = torch.zeros(max_samples, dtype=torch.int32, device=self._device)
        self.hidden = torch.zeros(max_samples, hidden_size, dtype=dtype, device=self._device)
        """[max_samples, H]: where a step's body leaves the sampled tokens' hidden states."""
        self.host_tokens = torch.zeros(2, max_samples, dtype=torch.int32, pin_memory=True)
        """[2, max_samples]: sampled tokens of even and of odd steps."""
        self.arenas = batch_kernels.Arenas.allocate(layout.HEADER_WORDS, kernels.device)
        """The steps' arenas; `allocate_arenas` gives them their size."""

    def allocate_arenas(self, num_words: int) -> None:
        self.arenas = batch_kernels.Arenas.allocate(num_words, self._kernels.device)

    def expect(self, step: int) -> None:
        """The next arena to be taken over is that of `step`, which need not follow the last one
        that ran."""
        self._last_step.fill_((step - 1) & 0x7FFFFFFF)

    @property
    def _last_step(self) -> Tensor:
        """[1]: the number of the step whose arena the device has."""
        return self.arenas.own[layout.H_STEP : layout.H_STEP + 1]

    def prepare(
        self, num_tokens: int, num_rows: int, *, decode_only: bool, all_sample: bool
    ) -> Batch:
        """Expand the arena to the padded sizes, and plan the attention of all layers."""
        whole, apart = self._batch, not decode_only and num_tokens >= _MANY_TOKENS
        sizes = batch_kernels.BatchTensors(
            whole.tokens[:num_tokens],
            whole.positions[:num_tokens],
            whole.slots[:num_tokens],
            whole.rows[:num_rows],
            whole.q_start[: num_rows + 1],
            whole.kv_len[:num_rows],
            whole.sample_tokens[:num_rows],
            whole.sample_rows[:num_rows],
            whole.sample_positions[:num_rows],
            whole.sample_slots[:num_rows],
        )
        self._expand(self.arenas, self._tables, sizes, places=apart)
        work = self._attention.plan(
            sizes.rows, sizes.q_start, sizes.kv_len, num_tokens=num_tokens, decode_only=decode_only
        )
        return Batch(
            tokens=sizes.tokens,
            positions=sizes.positions,
            slots=sizes.slots,
            rows=sizes.rows,
            q_start=sizes.q_start,
            kv_len=sizes.kv_len,
            sample_tokens=sizes.sample_tokens,
            sample_rows=sizes.sample_rows,
            block_table=self._tables.block_table,
            work=work,
            all_sample=all_sample,
            samples=self._samples(sizes) if apart else None,
        )

    def _samples(self, step: batch_kernels.BatchTensors) -> Batch:
        """The step's samples as one of decodes; padding stands at position 0 of slot 0. Whatever
        attends for it first makes its lists, behind the keys of all tokens."""
        rows, positions = step.sample_rows, step.sample_positions
        q_start = self._one_each[: len(rows) + 1]
        work = self._attention.plan(
            rows, q_start, positions, num_tokens=len(rows), decode_only=True
        )
        return Batch(
            tokens=step.sample_tokens,
            positions=positions,
            slots=step.sample_slots,
            rows=rows,
            q_start=q_start,
            kv_len=positions,
            sample_tokens=q_start[:-1],
            sample_rows=rows,
            block_table=self._tables.block_table,
            work=work,
            all_sample=True,
        )

    def chunks_of(self, size: int) -> LogitChunks:
        """What the product that makes the logits of `size` samples may fill for `sample`."""
        return self._sampler.chunks(self._rows(size))

    def _rows(self, size: int) -> sampler.SampledRows:
        return sampler.SampledRows(
            self._batch.sample_rows[:size],
            self._batch.sample_tokens[:size],
            self._batch.positions,
            self._tables.params,
        )

    def sample(self, logits: Logits, *, edits: bool = False, max_logprobs: int = -1) -> Sampled:
        """[S, V] -> the tokens of the first S samples, on the device and on their way to the host.

        edits: some row has a feature of EDITS. max_logprobs: as SamplingStep has it.
        """
        size = logits.x.shape[0]
        rows = self._rows(size)
        tokens = self._tokens[:size]
        # Memory first: a step that finds none runs once more, but not once it has sampled, since
        # its tokens are what the next one goes on from.
        logprobs = None
        if max_logprobs >= 0:
            logprobs = self._sampler.allocate_logprobs(size, max_logprobs)
        chosen_from, scanned = logits.x, logits.scanned
        if edits:
            # Log-probabilities are those of the unmodified distribution.
            out = torch.empty_like(logits.x) if max_logprobs >= 0 else None
            chosen_from, scanned = self._sampler.edit(logits.x, rows, out=out), False
        host = sampler.HostTokens(self.host_tokens, self._last_step)
        last_token = self._tables.last_token
        self._sampler.sample(chosen_from, rows, tokens, last_token, host=host, scanned=scanned)
        if logprobs is None:
            return Sampled(tokens)
        self._sampler.logprobs(logits.x, tokens, logprobs)
        return Sampled(tokens, *logprobs)

    def move_blocks(self, plan: Plan, arena_index: int, cache: KVCache, host: KVCache) -> None:
        """Swap out, swap in and copy the blocks that the step's arena lists. It is copied to the
        device for that, in front of the step's first kernel, which takes it over once more."""
        arena, own = self.arenas.pinned[arena_index], self.arenas.own
        own[: plan.num_words].copy_(arena[: plan.num_words], non_blocking=True)
        for count, section, counted, target, source in (
            (plan.num_swap_out, layout.H_SWAP_OUT, layout.H_NUM_SWAP_OUT, host, cache),
            (plan.num_swap_in, layout.H_SWAP_IN, layout.H_NUM_SWAP_IN, cache, host),
            (plan.num_copies, layout.H_COPIES, layout.H_NUM_COPIES, cache, cache),
        ):
            if count:
                start = int(arena[section])
                blocks.copy_blocks(
                    self._kernels,
                    target.runs(),
                    source.runs(),
                    own[start : start + 2 * count],
                    own[counted : counted + 1],
                )
        self.expect(plan.step)


def programs(dtype: torch.dtype, vocab_size: int) -> list[Program]:
    """What a step needs besides the model's own operations."""
    return [
        batch_kernels.program(layout.MACROS),
        blocks.PROGRAM,
        *sampler.programs(dtype, vocab_size, layout.MACROS),
    ]
