"""What a model's steps look like on the GPU, and the kernels to compile for them at start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import Progress

from zllm.cuda import activation, attention, decoder, embedding, linear_many, norm, rope_cache
from zllm.cuda.attention import AttentionSpec
from zllm.cuda.compiler import Program
from zllm.cuda.decoder_plan import DecoderShape
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.linear import HEAD_DIM, SkinnyLinear
from zllm.runtime import cuda_step
from zllm.runtime.config import EngineConfig
from zllm.runtime.kv_cache import kv_cache_dtype
from zllm.runtime.model_config import ModelConfig

_MAX_NUM_BATCHED_TOKENS = 8192
"""Where somebody waits for single tokens: twice as many gain up to 3% (docs/decisions/072)."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """The limits and types of every step."""

    max_tokens: int
    max_rows: int
    max_model_len: int
    """Before memory has its say."""
    dtype: torch.dtype
    attention: AttentionSpec

    @staticmethod
    def of(config: EngineConfig, model: ModelConfig) -> StepShape:
        """Raises ConfigError where the settings and the model do not agree."""
        dtype = model.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        kv_dtype = kv_cache_dtype(config.kv_cache_dtype, dtype)
        usual = _MAX_NUM_BATCHED_TOKENS * (1 if config.interactive else 2)
        max_tokens = config.max_num_batched_tokens or max(usual, config.max_num_seqs)
        return StepShape(
            max_tokens=max_tokens,
            max_rows=min(config.max_num_seqs, max_tokens),
            max_model_len=model.context_length(config.max_model_len),
            dtype=dtype,
            attention=AttentionSpec(
                model.num_heads, model.num_kv_heads, model.head_dim, dtype, kv_dtype
            ),
        )


def compile_kernels(kernels: KernelLibrary, model: ModelConfig, shape: StepShape) -> None:
    """Bring every program that serving this model launches into the cache, with a progress bar. As
    all models of the registry, it has QK-norm."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("Compiling kernels", total=None)
        kernels.prepare(
            _programs(kernels, model, shape),
            lambda done, total, _: bar.update(task, completed=done, total=total),
        )


def _programs(kernels: KernelLibrary, model: ModelConfig, shape: StepShape) -> Iterator[Program]:
    dtype, spec = shape.dtype, shape.attention
    for rows in (1, shape.max_tokens):
        yield norm.program(dtype, model.hidden_size, rows)
    yield activation.program(dtype, model.intermediate_size)
    yield embedding.PROGRAM
    head_sizes = model.num_heads, model.num_kv_heads, model.head_dim
    for tokens in (1, shape.max_tokens):
        yield rope_cache.program(dtype, spec.kv_dtype, *head_sizes, qk_norm=True, tokens=tokens)
    yield from attention.programs(spec, kernels.compiler.arch)
    yield from cuda_step.programs(dtype, model.vocab_size)
    whole = DecoderShape(
        model.hidden_size,
        model.intermediate_size,
        model.num_heads,
        model.num_kv_heads,
        model.head_dim,
        qk_norm=True,
        num_layers=model.num_layers,
    )
    if not model.attention_bias and decoder.supports(kernels, whole, dtype, spec.kv_dtype):
        yield from decoder.programs(kernels, whole)
    if dtype != torch.float32:
        skinny, fused = SkinnyLinear(kernels), dtype == torch.bfloat16
        hidden, inner = model.hidden_size, model.intermediate_size
        heads = model.num_heads * model.head_dim
        qkv = heads + 2 * model.num_kv_heads * model.head_dim
        biased = model.attention_bias  # which torch adds
        if not biased:
            of_128 = fused and model.head_dim == HEAD_DIM
            macros = rope_cache.head_macros(spec.kv_dtype, *head_sizes[:2], qk_norm=True)
            ends = macros if of_128 else None
            yield from skinny.programs(qkv, hidden, dtype, norm=fused, heads=ends)
            yield from skinny.programs(hidden, heads, dtype, residual=True)
        yield from skinny.programs(
            2 * inner, hidden, dtype, norm=fused, gated=True, left=not biased
        )
        yield from skinny.programs(hidden, inner, dtype, residual=True)
        yield from skinny.programs(model.vocab_size, hidden, dtype, norm=fused, head=True)
        if kernels.hopper:
            norms = linear_many.applies_norms(kernels, dtype)
            yield from linear_many.programs(
                dtype, spec.kv_dtype, *head_sizes, qk_norm=True, norm=norms
            )
