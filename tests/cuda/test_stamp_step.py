"""The tool that stamps a step's thread blocks (benchmarks/gpu/stamp_step.py) fits the kernels."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import zllm.cuda.compiler
from zllm.cuda.attention_spec import AttentionSpec, programs
from zllm.cuda.compiler import Compiler
from zllm.cuda.linear_plans import Tiled, tiled_plan
from zllm.cuda.rope_cache import head_macros
from zllm.cuda.rope_cache import program as rope_program
from zllm.runtime.model_config import ModelConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def stamp_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for folder in (BENCHMARKS, BENCHMARKS / "gpu"):
        monkeypatch.syspath_prepend(str(folder))
    import stamp_step

    yield stamp_step
    for name in ("stamp_step", "kernels_decoder", "kernels_linear"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("model", ["0.6b", "4b", "8b"])
def test_stamped_kernels_compile(stamp_step: ModuleType, tmp_path: Path, model: str) -> None:
    root = tmp_path / "cuda"
    shutil.copytree(Path(zllm.cuda.compiler.__file__).parent, root)
    config = ModelConfig.from_folder(BENCHMARKS / "models" / f"qwen3-{model}")
    stamp_step.put_stamps(root, config, 1 << 40)
    compiler = Compiler("sm_90a", cache_dir=tmp_path, root=root)
    dtype, heads, kv_heads = torch.bfloat16, config.num_heads, config.num_kv_heads
    spec = AttentionSpec(heads, kv_heads, config.head_dim, dtype, dtype)
    decode = programs(spec, "sm_90a")[1]
    rope = rope_program(dtype, dtype, heads, kv_heads, config.head_dim, True, 64)
    assert decode.source == "attention_decode.cu"
    for program in (decode, rope):
        compiler.compile(program.source, program.defines)
    plan = tiled_plan(64, config.hidden_size, config.intermediate_size, 132, 30)
    fused = {"SCALAR": "__nv_bfloat16", "ADD": 1, "SCALED": 1, "GATED": 0, "NORM": 0, "QKV": 0}
    compiler.compile("linear_wgmma.cu", {**plan.macros(), **fused})
    qkv = {**fused, "ADD": 0, "SCALED": 0, "NORM": 1, "QKV": 1}
    qkv |= head_macros(dtype, heads, kv_heads, qk_norm=True)
    compiler.compile("linear_wgmma.cu", {**Tiled(64, 128, 2, 1).macros(), **qkv})
    assert compiler.compiled == 4


def test_a_time_line_is_told_from_the_end_of_attention(stamp_step: ModuleType) -> None:
    """Of layers that begin 100 us apart: the output projection of each starts 2 us behind its
    attention in the first block, 3 us in the last, and attention 50 us behind the one before."""
    kernels, layers = stamp_step.KERNELS, 8
    records = stamp_step.records_like()
    blocks = len(kernels) * stamp_step.MOST_BLOCKS
    times = records[blocks:].view(
        len(kernels), stamp_step.MOST_BLOCKS, stamp_step.MOST_LAYERS, len(stamp_step.EVENTS)
    )
    for layer in range(layers):
        end = 10**15 + layer * 100_000
        times[kernels.index("attention"), :2, layer, 0] = torch.tensor([end - 50_000, end - 49_000])
        times[kernels.index("attention"), :2, layer, -1] = torch.tensor([end - 1_000, end])
        times[kernels.index("output"), :2, layer, 0] = torch.tensor([end + 2_000, end + 3_000])
    assert stamp_step.time_line(records, layers) == [
        ("output", "started", 2.0, 2.0, 3.0),
        ("attention", "started", 50.0, 50.0, 51.0),
        ("attention", "ended", 99.0, 99.0, 100.0),
    ]
