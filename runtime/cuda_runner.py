"""The GPU's runner: the batch lives on the device, and a step is one or two graphs.

A step runs a body (from its arena, cython/arena.pxd, to the hidden states of the sampled tokens)
and a head (logits, sampling): CUDA graphs where the step fits one, of both together where it has
few sequences to decode, single launches elsewhere. Kernels read arenas from pinned memory and leave
sampled tokens there; on the device tokens stay for the next step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import Progress

from zllm.cuda.attention import PagedAttention
from zllm.cuda.event import Event
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.linear_many import applies_norms
from zllm.native import arena as layout
from zllm.native.step_objects import Plan
from zllm.runtime.config import BLOCK_SIZE, EngineConfig
from zllm.runtime.cuda_graphs import (
    SHORT_STEP,
    StepGraphs,
    bucket_of,
    choose_buckets,
    no_garbage,
)
from zllm.runtime.cuda_memory import memory_taken, plan_memory
from zllm.runtime.cuda_ops import CudaOps
from zllm.runtime.cuda_programs import StepShape, compile_kernels
from zllm.runtime.cuda_step import EDITS, CudaStep
from zllm.runtime.hub import resolve_model
from zllm.runtime.kv_cache import allocate_kv_cache, block_bytes, pool_line
from zllm.runtime.loader import dummy_weights, load_weights, weights_bytes
from zllm.runtime.model_config import ModelConfig
from zllm.runtime.model_runner import StepResult, spread_rows
from zllm.runtime.models.parameters import fold_norms
from zllm.runtime.models.registry import model_class
from zllm.runtime.ops import Hidden, Sampled
from zllm.runtime.row_tables import allocate_row_tables

_log = logging.getLogger(__name__)
_GIB = 1024**3
_PROBE_BYTES = 64 * 1024**2


class _Ticket(NamedTuple):
    """A launched step: when it is done, and where its tokens are."""

    done: Event
    step: int
    num_rows: int
    sampled_rows: npt.NDArray[np.intp] | None
    """Rows of the step that sample; None: all of them."""
    extras: tuple[torch.Tensor | None, ...]
    """Log-probabilities, ranks and the most likely, on their way to pinned memory; empty where no
    row asked for them."""
    failed: bool
    """The step could not run: every row of it ends with an error."""


class CudaRunner:
    """ModelRunner (runtime/model_runner.py) on one NVIDIA GPU."""

    def __init__(self, config: EngineConfig) -> None:
        started = time.perf_counter()
        kernels = KernelLibrary()
        self.device = torch.device("cuda", kernels.device)
        taken_before = memory_taken(self.device)
        folder = resolve_model(config.model)
        self.model_config = model_config = ModelConfig.from_folder(folder)
        self._shape = shape = StepShape.of(config, model_config)
        self.max_num_batched_tokens = shape.max_tokens
        compile_kernels(kernels, model_config, shape)
        compiled = time.perf_counter()

        model = model_class(model_config)
        parameters = list(model.parameters(model_config))
        if config.load_format == "dummy":
            std = model_config.initializer_range
            weights = dummy_weights(parameters, shape.dtype, self.device, std=std, seed=config.seed)
        else:
            weights = load_weights(folder, parameters, shape.dtype, self.device)
        torch.cuda.synchronize(self.device)
        loaded = time.perf_counter()

        # Products apply norms without gains by themselves (docs/decisions/080).
        folds = applies_norms(kernels, shape.dtype)
        folded_norms = fold_norms(weights, parameters) if folds else 0
        self.model = model(model_config, weights, shape.max_model_len, self.device)
        spec = shape.attention
        self._tables = allocate_row_tables(shape.max_rows, shape.max_model_len, self.device)
        attention = PagedAttention(
            kernels, spec, max_rows=shape.max_rows, max_tokens=shape.max_tokens
        )
        self._step = CudaStep(
            kernels,
            self._tables,
            attention,
            max_tokens=shape.max_tokens,
            max_samples=shape.max_rows,
            hidden_size=model_config.hidden_size,
            vocab_size=model_config.vocab_size,
            dtype=shape.dtype,
        )
        self._ops = CudaOps(kernels, attention, self._step.chunks_of, folded_norms=folded_norms)
        self._cache = allocate_kv_cache(model_config, 1, spec.kv_dtype, self.device)
        step_peak = self._profile()

        size = weights_bytes(weights)
        per_block = block_bytes(model_config, spec.kv_dtype)
        memory = plan_memory(
            self.device,
            taken_before=taken_before,
            share=config.memory_share or 1.0,
            weights=size,
            step_peak=step_peak,
            block_bytes=per_block,
            utilization=config.gpu_memory_utilization,
            wanted_blocks=config.num_kv_blocks,
            request_blocks=-(-shape.max_model_len // BLOCK_SIZE),
            shrink=config.max_model_len is None,
        )
        self.max_model_len = min(shape.max_model_len, memory.num_blocks * BLOCK_SIZE)
        self.num_kv_blocks = memory.num_blocks + 1
        self.num_host_blocks = int(config.swap_space_gib * _GIB) // per_block
        self._cache = allocate_kv_cache(
            model_config, self.num_kv_blocks, spec.kv_dtype, self.device
        )
        self._host_cache = allocate_kv_cache(
            model_config, self.num_host_blocks, spec.kv_dtype, torch.device("cpu"), pinned=True
        )
        self.swap_cost = self._swap_cost(per_block) if self.num_host_blocks else 0.0
        self._buckets = choose_buckets(shape.max_rows, shape.max_tokens)
        self._graphs: StepGraphs | None = None if config.enforce_eager else StepGraphs(self.device)
        self._host_tokens = self._step.host_tokens.numpy()
        # A step is collected before the one after the next is launched, which has its arena.
        self._done = (Event(kernels.device), Event(kernels.device))
        self.arenas = (np.zeros(0, np.int32), np.zeros(0, np.int32))
        self.gpu = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
        self.report = [
            f"model: {model_config.architecture}, {model_config.num_parameters / 1e6:,.1f} M "
            f"parameters, {size / _GIB:.2f} GiB in {str(shape.dtype).removeprefix('torch.')}, "
            f"loaded at {size / 1e9 / max(loaded - compiled, 1e-9):.1f} GB/s",
            f"device: {torch.cuda.get_device_name(self.device)}, kernels for "
            f"{kernels.compiler.arch}: {kernels.compiler.compiled} compiled, the rest cached, "
            f"in {compiled - started:.1f} s",
            *memory.lines(),
            pool_line(memory.num_blocks, per_block, self.max_model_len),
            *model_config.notes(),
        ]

    def allocate_arenas(self, num_words: int) -> None:
        """Make the pinned arenas, then capture the graphs, which read them."""
        self._step.allocate_arenas(num_words)
        first, second = self._step.arenas.pinned
        self.arenas = (first.numpy(), second.numpy())
        if self._graphs is not None:
            started = time.perf_counter()
            self._capture(self._graphs)
            took = time.perf_counter() - started
            self.report.append(f"CUDA graphs: {len(self._graphs)} captured in {took:.1f} s")
        self._step.expect(0)

    def launch(self, plan: Plan, arena_index: int) -> _Ticket:
        if plan.num_swap_out or plan.num_swap_in or plan.num_copies:
            self._step.move_blocks(plan, arena_index, self._cache, self._host_cache)
        try:
            sampled, failed = self._run(plan), False
        except torch.OutOfMemoryError as error:
            # Another process took what the profiling run had left. What a failed attempt wrote is
            # written again, so the step may simply run once more.
            _log.warning("step %d ran out of GPU memory, trying again: %s", plan.step, error)
            torch.cuda.empty_cache()
            sampled, failed = self._run_again(plan)
        extras: tuple[torch.Tensor | None, ...] = ()
        if sampled is not None and sampled.logprobs is not None:
            # Copied behind this step: asked for in `collect`, they would wait for the next one.
            found = (sampled.logprobs, sampled.ranks, sampled.top_ids, sampled.top_logprobs)
            extras = tuple(x if x is None else x.to("cpu", non_blocking=True) for x in found)
        done = self._done[arena_index]
        done.record()
        rows = None
        if plan.num_sampled != plan.num_rows:
            host = self.arenas[arena_index]
            start = host[layout.H_FLAGS]
            rows = np.flatnonzero(host[start : start + plan.num_rows] & layout.F_SAMPLE)
        return _Ticket(done, plan.step, plan.num_rows, rows, extras, failed)

    def collect(self, ticket: _Ticket) -> StepResult:
        ticket.done.synchronize()
        rows, num_rows = ticket.sampled_rows, ticket.num_rows
        count = num_rows if rows is None else len(rows)
        if ticket.failed:
            return StepResult(np.full(num_rows, -1, np.int32))
        tokens = self._host_tokens[ticket.step & 1, :count].copy()
        found = [
            None if x is None else spread_rows(x[:count].numpy(), num_rows, rows)
            for x in ticket.extras
        ]
        return StepResult(spread_rows(tokens, num_rows, rows), *found)

    def close(self) -> None:
        torch.cuda.synchronize(self.device)
        del self._graphs, self.model, self._cache, self._host_cache, self._step, self._ops
        torch.cuda.empty_cache()

    def _run(self, plan: Plan) -> Sampled | None:
        decode_only = plan.num_decodes == plan.num_tokens
        all_sample = decode_only and plan.num_sampled == plan.num_tokens
        edits = bool(plan.features & EDITS)
        # The head's graph gives nothing but tokens.
        plain = plan.num_sampled > 0 and not edits and plan.max_logprobs < 0
        graphs = self._graphs if plain else None
        size = bucket_of(plan.num_sampled, self._buckets.decode) if graphs is not None else None
        if graphs is not None and size is not None and all_sample and size <= SHORT_STEP:
            graphs.replay("step", size)
            return None
        # A head's graph reads as many samples as its size: the body must have written so many.
        self._run_body(max(plan.num_tokens, size or 0), decode_only=decode_only)
        if graphs is not None and size is not None:
            graphs.replay("head", size)
            return None
        if not plan.num_sampled:
            return None
        return self._head(plan.num_sampled, edits=edits, max_logprobs=plan.max_logprobs)

    def _run_again(self, plan: Plan) -> tuple[Sampled | None, bool]:
        """What `_run` gives, and whether it failed for good."""
        self._step.expect(plan.step)
        try:
            return self._run(plan), False
        except torch.OutOfMemoryError as error:
            self._step.expect(plan.step + 1)
            _log.error("step %d: %d rows fail: %s", plan.step, plan.num_rows, error)
            return None, True

    def _run_body(self, num_tokens: int, *, decode_only: bool) -> None:
        kind = "decode" if decode_only else "mixed"
        sizes = self._buckets.decode if decode_only else self._buckets.mixed
        size = bucket_of(num_tokens, sizes)
        if size is None or self._graphs is None:
            self._body(num_tokens, decode_only=decode_only)
        else:
            self._graphs.replay(kind, size)

    def _body(self, num_tokens: int, *, decode_only: bool, all_sample: bool = False) -> Hidden:
        """From the arena to the hidden states of the sampled tokens, which the step's buffer gets
        unless `all_sample`. Launches only."""
        num_rows = num_tokens if decode_only else min(num_tokens, self._shape.max_rows)
        batch = self._step.prepare(
            num_tokens, num_rows, decode_only=decode_only, all_sample=all_sample
        )
        out = self._step.hidden[: len(batch.sample_tokens)]
        return self.model.forward(self._ops, batch, self._cache, out)

    def _head(self, size: int, *, edits: bool = False, max_logprobs: int = -1) -> Sampled:
        """From the step's buffer to sampled tokens. Launches only."""
        hidden = Hidden(self._step.hidden[:size], self.model.final_norm)
        return self._sample(hidden, edits=edits, max_logprobs=max_logprobs)

    def _decode_step(self, num_tokens: int) -> None:
        """Body and head of a step whose tokens all sample. Launches only."""
        self._sample(self._body(num_tokens, decode_only=True, all_sample=True))

    def _sample(self, hidden: Hidden, *, edits: bool = False, max_logprobs: int = -1) -> Sampled:
        logits = self.model.logits(self._ops, hidden)
        return self._step.sample(logits, edits=edits, max_logprobs=max_logprobs)

    def _capture(self, graphs: StepGraphs) -> None:
        buckets = self._buckets
        short = tuple(size for size in buckets.decode if size <= SHORT_STEP)
        total = len(buckets.mixed) + 2 * len(buckets.decode) + len(short)
        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
            task = bar.add_task("Capturing CUDA graphs", total=total)

            def captured() -> None:
                bar.advance(task)

            mixed, decode = buckets.mixed, buckets.decode
            with no_garbage():
                graphs.capture("mixed", mixed, lambda n: self._body(n, decode_only=False), captured)
                graphs.capture(
                    "decode", decode, lambda n: self._body(n, decode_only=True), captured
                )
                graphs.capture("head", decode, self._head, captured)
                graphs.capture("step", short, self._decode_step, captured)
        torch.cuda.synchronize(self.device)

    def _profile(self) -> int:
        """Bytes that the largest step takes beyond what is allocated before it."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self._body(self._shape.max_tokens, decode_only=False)
        self._head(self._shape.max_rows)
        torch.cuda.synchronize(self.device)
        # The allocator keeps the memory: no other process can take it from a running engine.
        peak = torch.cuda.max_memory_allocated(self.device) - before
        return peak

    def _swap_cost(self, per_block: int) -> float:
        """Measured: tokens of a full step in the time of one block's way to the host and back."""
        device = torch.empty(_PROBE_BYTES, dtype=torch.uint8, device=self.device)
        host = torch.empty(_PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
        both_ways = self._timed(lambda: (host.copy_(device), device.copy_(host)))
        step = self._timed(lambda: self._body(self._shape.max_tokens, decode_only=False))
        return both_ways * per_block / _PROBE_BYTES * self._shape.max_tokens / step

    def _timed(self, run: Callable[[], object]) -> float:
        """Seconds of the second of two runs."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
