"""What serving a model launches is what is compiled for it at start: no GPU is needed to see."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import zllm.runtime.cuda_programs as cuda_programs
from zllm.cuda import activation, embedding, linear, linear_many, norm, rope_cache
from zllm.cuda.attention import AttentionWork
from zllm.cuda.attention_spec import AttentionSpec
from zllm.cuda.compiler import Program
from zllm.cuda.logit_chunks import LogitChunks
from zllm.cuda.rope_cache import RopeCache
from zllm.runtime.cuda_graphs import SHORT_STEP, choose_buckets
from zllm.runtime.cuda_ops import CudaOps
from zllm.runtime.model_config import ModelConfig
from zllm.runtime.models.qwen3 import Qwen3
from zllm.runtime.ops import Batch, Hidden

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
MAX_ROWS, MAX_TOKENS = 256, 8192
MANY_ROWS = {"linear_gated.cu", "linear_qkv.cu"}
"""Taken from some number of tokens on, whatever the model: listed for each."""
SIZES = {
    "0.6b": (1024, 3072, 16, 8, 128, 151936),
    "4b": (2560, 9728, 32, 8, 128, 151936),
    "8b": (4096, 12288, 32, 8, 128, 151936),
    "32b": (5120, 25600, 64, 8, 128, 151936),
    "embedded": (256, 768, 4, 2, 64, 896),
    "small vocabulary": (1024, 3072, 16, 8, 128, 16384),
}
NAMES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size"),
)


class _Library:
    """A KernelLibrary that remembers what it is asked for."""

    def __init__(self, num_sms: int, hopper: bool) -> None:
        self.num_sms, self.hopper, self.pdl, self.device = num_sms, hopper, hopper, 0
        self.asked: set[tuple[str, Any]] = set()

    @property
    def compiler(self) -> _Library:
        return self

    arch = "sm_90a"

    def device_attribute(self, name: str) -> int:
        return 227 * 1024 if "BLOCK" in name else 228 * 1024

    def clusters_at_once(self, size: int) -> int:
        return {2: self.num_sms // 2, 4: self.num_sms // 9 * 2}[size]

    def get(self, source: str, function: str, defines: Any = None) -> _Library:
        self.asked.add(_key(Program(source, defines or {})))
        return self

    def launch(self, *_: Any, **__: Any) -> None: ...


def _key(program: Program) -> tuple[str, Any]:
    return program.source, tuple(sorted(program.defines.items()))


class _Attention:
    """Attention has programs of its own, whatever the step."""

    def make_lists(self, work: AttentionWork) -> None: ...

    def lets_read_early(self, work: AttentionWork) -> bool:
        return True

    def run(self, q: Tensor, *_: Any, **__: Any) -> Tensor:
        return q.new_empty(q.shape[0], q.shape[1] * q.shape[2])


class _Cache:
    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        shape = (config.num_layers, 2, config.num_kv_heads, 16, config.head_dim)
        self.keys = self.values = torch.empty(shape, dtype=dtype, device="meta")
        self.data = self.keys


@pytest.fixture(autouse=True)
def _no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of no device have neither addresses nor the right one."""
    for module in (activation, embedding, linear_many, norm, rope_cache):
        for name in ("require", "require_vectors"):
            monkeypatch.setattr(module, name, lambda *_: None, raising=False)
    products = linear.SkinnyLinear
    shapes = lambda _, x, weight, gated: x.shape  # noqa: E731
    monkeypatch.setattr(products, "_check_operands", shapes)
    monkeypatch.setattr(linear, "_check_like", lambda *_: None)
    monkeypatch.setattr(linear.TensorMaps, "get", lambda *_: None)
    monkeypatch.setattr(linear_many.TensorMaps, "get", lambda *_: None)
    monkeypatch.setattr(RopeCache, "check", lambda *_: None)
    monkeypatch.setattr(LogitChunks, "arguments", lambda *_: ())


def _launched(config: ModelConfig, kv_dtype: torch.dtype, library: Any) -> set[tuple[str, Any]]:
    """By steps of all sizes, with graphs and without."""
    weights = {
        parameter.name: torch.empty(parameter.shape, dtype=config.dtype, device="meta")
        for parameter in Qwen3.parameters(config)
    }
    chunks = LogitChunks(*(torch.empty(0, device="meta"),) * 3, temperature=0)
    ops = CudaOps.__new__(CudaOps)
    vars(ops).update(
        _kernels=library,
        _attention=_Attention(),
        _skinny=linear.SkinnyLinear(library),
        _many=linear_many.ManyRows(library),
        _chunks_of=lambda _: chunks,
        _one=None,
        _folded_norms=2 * config.num_layers * linear_many.applies_norms(library, config.dtype),
        device=torch.device("meta"),
        _decode=lambda *_: None,
    )
    model = Qwen3(config, weights, 64, torch.device("meta"))
    cache: Any = _Cache(config, kv_dtype)

    def body(tokens: int, rows: int, *, all_sample: bool = False) -> Hidden:
        def ints(count: int) -> Tensor:
            return torch.empty(count, dtype=torch.int32, device="meta")

        def step(tokens: int, all_sample: bool, samples: Batch | None = None) -> Batch:
            by_token, by_row = [ints(tokens) for _ in range(3)], [ints(rows) for _ in range(4)]
            sizes = *by_token, by_row[0], ints(rows + 1), *by_row[1:], ints(1)
            return Batch(*sizes, None, all_sample, samples)

        batch = step(tokens, all_sample, step(rows, True) if tokens > rows else None)
        out = torch.empty(rows, config.hidden_size, dtype=config.dtype, device="meta")
        return model.forward(ops, batch, cache, out)

    buckets = choose_buckets(MAX_ROWS, MAX_TOKENS)
    for tokens in (*buckets.mixed, MAX_TOKENS):
        body(tokens, min(tokens, MAX_ROWS))
    for rows in (1, 5, *range(8, MAX_ROWS + 1, 8)):
        hidden = body(rows, rows)
        model.logits(ops, Hidden(hidden.x, hidden.norm))
        if rows <= SHORT_STEP:
            model.logits(ops, body(rows, rows, all_sample=True))
    return library.asked


def _cases() -> Iterator[Any]:
    for name in SIZES:
        yield pytest.param(name, BF16, BF16, 132, True, False, id=name)
    yield pytest.param("0.6b", FP16, FP16, 132, True, False, id="float16")
    yield pytest.param("4b", BF16, FP8, 132, True, False, id="float8 cache")
    yield pytest.param("0.6b", BF16, BF16, 132, True, True, id="0.6b with biases")
    yield pytest.param("8b", BF16, BF16, 132, True, True, id="8b with biases")
    yield pytest.param("8b", BF16, BF16, 78, True, False, id="78 multiprocessors")
    yield pytest.param("0.6b", BF16, BF16, 108, False, False, id="before Hopper")


@pytest.mark.parametrize(("name", "dtype", "kv_dtype", "num_sms", "hopper", "biased"), [*_cases()])
def test_all_that_is_launched_was_compiled_at_start(
    name: str,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    num_sms: int,
    hopper: bool,
    biased: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = dict(zip(NAMES, SIZES[name], strict=True))
    config = ModelConfig.from_dict(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "num_hidden_layers": 3,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "attention_bias": biased,
            "dtype": str(dtype).removeprefix("torch."),
            **sizes,
        },
        None,
    )
    library: Any = _Library(num_sms, hopper)
    for module, listed in (("attention", "programs"), ("cuda_step", "programs")):
        monkeypatch.setattr(getattr(cuda_programs, module), listed, lambda *_: [])
    monkeypatch.setattr(cuda_programs.decoder, "supports", lambda *_: False)
    spec = AttentionSpec(config.num_heads, config.num_kv_heads, config.head_dim, dtype, kv_dtype)
    shape = cuda_programs.StepShape(MAX_TOKENS, MAX_ROWS, 4096, dtype, spec)
    programs = {_key(program) for program in cuda_programs._programs(library, config, shape)}
    launched = _launched(config, kv_dtype, library)
    assert not launched - programs
    unused = [program for program in programs - launched if program[0] not in MANY_ROWS]
    assert len(unused) <= len(programs) // 3
