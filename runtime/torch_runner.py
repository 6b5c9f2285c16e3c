"""The CPU's runner: a step runs at once, in torch, and is done when `launch` returns."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zllm.errors import ConfigError
from zllm.native import arena as layout
from zllm.native.step_objects import Plan
from zllm.runtime.config import BLOCK_SIZE, EngineConfig
from zllm.runtime.host_memory import available_memory
from zllm.runtime.hub import resolve_model
from zllm.runtime.kv_cache import (
    KVCache,
    allocate_kv_cache,
    block_bytes,
    copy_blocks,
    kv_cache_dtype,
    pool_line,
)
from zllm.runtime.loader import dummy_weights, load_weights, weights_bytes
from zllm.runtime.model_config import ModelConfig
from zllm.runtime.model_runner import StepResult, spread_rows
from zllm.runtime.models.registry import model_class
from zllm.runtime.ops import Batch, Hidden, Sampled, SamplingStep
from zllm.runtime.row_tables import allocate_row_tables
from zllm.runtime.torch_attention import AttentionWork, written_kv
from zllm.runtime.torch_batch import Arena, pairs, prepare, update_tables
from zllm.runtime.torch_ops import TorchOps
from zllm.runtime.torch_sampler import sample

_MAX_NUM_BATCHED_TOKENS = 2048
_POOL_SHARE = 0.25
"""Of the memory that is available once the weights are loaded."""
_GIB = 1024**3


class TorchRunner:
    """ModelRunner (runtime/model_runner.py) on torch's own kernels."""

    def __init__(self, config: EngineConfig) -> None:
        self.device = torch.device("cpu")
        folder = resolve_model(config.model)
        self.model_config = model_config = ModelConfig.from_folder(folder)
        model = model_class(model_config)
        # Half precision is slower on most CPUs, so the checkpoint's own type is no reason for it.
        self.dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
        kv_dtype = _kv_dtype(config, self.dtype)
        parameters = model.parameters(model_config)
        if config.load_format == "dummy":
            std = model_config.initializer_range
            weights = dummy_weights(parameters, self.dtype, self.device, std=std, seed=config.seed)
        else:
            weights = load_weights(folder, parameters, self.dtype, self.device)

        per_block = block_bytes(model_config, kv_dtype)
        self.num_kv_blocks, self.max_model_len = _pool(config, model_config, per_block)
        self.num_host_blocks = int(config.swap_space_gib * _GIB) // per_block
        self.swap_cost = 0.0  # a copy within the host's memory costs nothing beside a token
        self.max_num_batched_tokens = config.max_num_batched_tokens or _MAX_NUM_BATCHED_TOKENS
        self.cache = self._allocate(model_config, self.num_kv_blocks, kv_dtype)
        self.host_cache = self._allocate(model_config, self.num_host_blocks, kv_dtype)
        self.tables = allocate_row_tables(config.max_num_seqs, self.max_model_len, self.device)
        self.ops = TorchOps(self.device)
        self.model = model(model_config, weights, self.max_model_len, self.device)
        self.arenas = (np.zeros(0, np.int32), np.zeros(0, np.int32))
        name = str(self.dtype).removeprefix("torch.")
        self.gpu = ""
        self.report = [
            f"model: {model_config.architecture}, {model_config.num_parameters / 1e6:,.1f} M "
            f"parameters, {weights_bytes(weights) / 1024**2:,.1f} MiB in {name}",
            f"device: cpu, {torch.get_num_threads()} threads",
            pool_line(self.num_kv_blocks - 1, per_block, self.max_model_len),
            *model_config.notes(),
        ]

    def allocate_arenas(self, num_words: int) -> None:
        self.arenas = (np.zeros(num_words, np.int32), np.zeros(num_words, np.int32))

    def launch(self, plan: Plan, arena_index: int) -> StepResult:
        """Run the step of `arenas[arena_index]`; the plan says nothing that its arena does not."""
        del plan
        return self.run(self.arenas[arena_index])

    def collect(self, ticket: StepResult) -> StepResult:
        return ticket

    def close(self) -> None:
        del self.model, self.cache, self.host_cache

    @torch.inference_mode()
    def run(self, arena: Arena) -> StepResult:
        """Execute one step."""
        copy_blocks(
            self.cache, self.host_cache, pairs(arena, layout.H_NUM_SWAP_OUT, layout.H_SWAP_OUT)
        )
        copy_blocks(
            self.host_cache, self.cache, pairs(arena, layout.H_NUM_SWAP_IN, layout.H_SWAP_IN)
        )
        copy_blocks(self.cache, self.cache, pairs(arena, layout.H_NUM_COPIES, layout.H_COPIES))
        update_tables(arena, self.tables)
        batch = prepare(arena, self.tables, self.cache, self.dtype)
        hidden = self.model.forward(self.ops, batch, self.cache)
        num_rows = int(arena[layout.H_NUM_ROWS])
        start = arena[layout.H_FLAGS]
        samples = arena[start : start + num_rows] & layout.F_SAMPLE != 0
        # Before _sample scrubs: the table of a row that fails may still name blocks that are a
        # chunk's by now, and without its NaN the chunk would pass.
        failed = None if samples.all() else self._failed_chunks(batch, ~samples)
        result = StepResult(np.zeros(num_rows, np.int32))
        if samples.any():
            sampled = self._sample(arena, batch, hidden)
            result = _by_row(sampled, num_rows, np.flatnonzero(samples))
        if failed is not None:
            result.tokens[failed] = -1
        return result

    def _sample(self, arena: Arena, batch: Batch, hidden: Hidden) -> Sampled:
        logits = self.model.logits(self.ops, hidden).x
        sampled = sample(
            logits,
            self.tables.params.index_select(0, batch.sample_rows),
            batch.positions.index_select(0, batch.sample_tokens) + 1,
            SamplingStep(int(arena[layout.H_FEATURES]), int(arena[layout.H_MAX_LOGPROBS])),
        )
        rows = batch.sample_rows.long()
        # The step after this one may be planned already, and must find a token it can embed.
        self.tables.last_token.index_copy_(0, rows, sampled.tokens.clamp(min=0))
        failed = rows[sampled.tokens < 0]
        if len(failed):
            self._scrub(self.tables.block_table[failed])
        return sampled

    def _failed_chunks(self, batch: Batch, chunks: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
        """The step's rows, of those that `chunks` picks, whose tokens cannot be computed. They have
        no logits to tell it by, but their keys and values do, before anyone shares them."""
        work: AttentionWork = batch.work
        last_layer = len(self.cache.keys) - 1
        written = written_kv(work, self.cache, last_layer, len(batch.tokens))
        bad_tokens = (~written.isfinite().all(dim=1)).numpy()
        bad_rows = np.logical_or.reduceat(bad_tokens, batch.q_start[:-1].numpy())
        failed = np.flatnonzero(bad_rows & chunks)
        if len(failed):
            rows = batch.rows[torch.from_numpy(failed)]
            self._scrub(self.tables.block_table[rows.long()])
        return failed

    def _scrub(self, blocks: Tensor) -> None:
        """Make a failed row's cache finite: whoever gets its blocks next multiplies what is
        masked by 0, and NaN would survive that."""
        by_block = self.cache.by_block()
        ids = blocks.unique().long()
        by_block.index_copy_(0, ids, by_block[ids].nan_to_num(0.0, 0.0, 0.0))

    def _allocate(self, config: ModelConfig, num_blocks: int, dtype: torch.dtype) -> KVCache:
        return allocate_kv_cache(config, num_blocks, dtype, self.device, "layer_major")


def _by_row(sampled: Sampled, num_rows: int, rows: npt.NDArray[np.intp]) -> StepResult:
    """Spread the sampled rows over the step's rows."""

    def spread(values: Tensor | None) -> npt.NDArray[Any] | None:
        return None if values is None else spread_rows(values.numpy(), num_rows, rows)

    return StepResult(
        spread_rows(sampled.tokens.numpy(), num_rows, rows),
        spread(sampled.logprobs),
        spread(sampled.ranks),
        spread(sampled.top_ids),
        spread(sampled.top_logprobs),
    )


def _kv_dtype(config: EngineConfig, dtype: torch.dtype) -> torch.dtype:
    if kv_cache_dtype(config.kv_cache_dtype, dtype) != dtype:
        raise ConfigError(
            f"kv_cache_dtype is {config.kv_cache_dtype!r}: on the CPU it must be 'auto', the "
            f"activations' own {dtype}"
        )
    return dtype


def _pool(config: EngineConfig, model: ModelConfig, per_block: int) -> tuple[int, int]:
    """The pool's blocks (block 0 included) and the longest request."""
    wanted_len = model.context_length(config.max_model_len)
    if config.num_kv_blocks is not None:
        # Blocks that requests may use; a request longer than the pool is refused on its own.
        return config.num_kv_blocks + 1, wanted_len
    share = _POOL_SHARE * (config.memory_share or 1.0)
    affordable = int(available_memory() * share) // per_block
    if config.max_model_len is None:
        wanted_len = min(wanted_len, affordable * BLOCK_SIZE)
    needed = -(-wanted_len // BLOCK_SIZE)
    if affordable < max(needed, 1):
        raise ConfigError(
            f"memory holds {affordable} KV blocks of {BLOCK_SIZE} tokens, but a request of "
            f"{wanted_len} tokens needs {needed}: lower max_model_len"
        )
    return min(needed * config.max_num_seqs, affordable) + 1, wanted_len
