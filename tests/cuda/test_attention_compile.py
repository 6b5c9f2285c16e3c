"""The attention kernels compile for every architecture, with no GPU; their limits are stated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zllm.cuda.attention_spec import AttentionSpec, decode_config, programs
from zllm.cuda.compiler import Compiler
from zllm.errors import KernelError

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a")
BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubins")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(32, 8, 128, BF16, BF16),
        AttentionSpec(16, 8, 64, FP16, FP8),
        AttentionSpec(8, 1, 256, BF16, BF16),
        AttentionSpec(16, 1, 96, FP16, FP16),
        AttentionSpec(4, 2, 64, FP32, FP32),
    ],
    ids=lambda s: f"{s.num_heads}x{s.num_kv_heads}x{s.head_dim}-{s.dtype}-{s.kv_dtype}",
)
def test_compiles(cache_dir: Path, arch: str, spec: AttentionSpec) -> None:
    compiler = Compiler(arch, cache_dir)
    for program in programs(spec, arch):
        assert compiler.compile(program.source, program.defines)[:4] == b"\x7fELF"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kv_dtype", [BF16, FP8])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_decode_fits_the_shared_memory(arch: str, kv_dtype: torch.dtype, head_dim: int) -> None:
    config = decode_config(AttentionSpec(8, 1, head_dim, BF16, kv_dtype), arch)
    limit = {"sm_80": 163, "sm_90a": 227}.get(arch, 99) * 1024
    assert config.shared_bytes <= limit
    assert config.blocks_per_sm * (config.shared_bytes + 1024) <= limit + 1024
    assert config.stages >= 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((8, 2, 80, BF16, BF16), "head_dim is 80"),
        ((9, 2, 128, BF16, BF16), "num_heads is 9"),
        ((64, 2, 128, BF16, BF16), "num_heads is 64"),
        ((8, 2, 128, BF16, FP16), "kv_dtype"),
        ((8, 2, 96, BF16, FP8), "kv_dtype"),
        ((8, 2, 128, FP32, FP8), "kv_dtype"),
        ((8, 2, 128, torch.int32, torch.int32), "dtype"),
    ],
)
def test_a_spec_that_no_kernel_serves_is_refused(arguments: tuple[object, ...], named: str) -> None:
    with pytest.raises(KernelError, match=named):
        AttentionSpec(*arguments)  # type: ignore[arg-type]
