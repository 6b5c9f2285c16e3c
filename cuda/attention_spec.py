"""What the attention kernels are compiled for, and how they fill a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zllm.cuda.compiler import Program
from zllm.cuda.occupancy import bytes_for, bytes_for_at_most
from zllm.errors import KernelError

BLOCK_TOKENS = 16
HEAD_DIMS = (64, 96, 128, 256)
MAX_GROUP = 16
DECODE_WARPS = 4
TILE_WARPS = 8
"""Warps that multiply in the wgmma kernel."""

_SCALARS = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half", torch.float32: "float"}
_MAX_STAGES = 3


@dataclass(frozen=True)
class AttentionSpec:
    """What the kernels are compiled for."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    """Queries and output: bfloat16, float16 or float32."""
    kv_dtype: torch.dtype
    """The cache: `dtype`, or float8_e4m3fn beside a 16-bit dtype."""

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS:
            raise KernelError(f"head_dim is {self.head_dim}: attention knows {HEAD_DIMS}")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise KernelError(
                f"num_heads is {self.num_heads} with {self.num_kv_heads} KV heads: "
                "it must be a multiple of them"
            )
        if not 1 <= self.group <= MAX_GROUP:
            raise KernelError(
                f"num_heads is {self.num_heads} with {self.num_kv_heads} KV heads: "
                f"at most {MAX_GROUP} query heads may share one"
            )
        if self.dtype not in _SCALARS:
            raise KernelError(f"dtype is {self.dtype}: attention knows {[*_SCALARS]}")
        if self.fp8:
            if self.dtype == torch.float32 or self.head_dim % 64:
                raise KernelError(
                    f"kv_dtype is {self.kv_dtype} with dtype {self.dtype} and head_dim "
                    f"{self.head_dim}: it needs a 16-bit dtype and a multiple of 64"
                )
        elif self.kv_dtype != self.dtype:
            raise KernelError(
                f"kv_dtype is {self.kv_dtype}: with dtype {self.dtype} it may be that or "
                "torch.float8_e4m3fn"
            )

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def fp8(self) -> bool:
        return self.kv_dtype == torch.float8_e4m3fn

    @property
    def run_bytes(self) -> int:
        """Bytes of one head's keys in one block."""
        return BLOCK_TOKENS * self.head_dim * self.kv_dtype.itemsize

    def defines(self, **more: int) -> dict[str, str | int]:
        return {
            "SCALAR": _SCALARS[self.dtype],
            "HEAD_DIM": self.head_dim,
            "GROUP": self.group,
            "KV_FP8": int(self.fp8),
            **more,
        }


@dataclass(frozen=True)
class PrefillConfig:
    """One of the prefill kernels and how it is launched."""

    source: str
    tile_rows: int
    tile_keys: int
    threads: int
    blocks_per_sm: int
    shared_bytes: int
    partial_floats: int = 0
    """Of a part of a tile, where a tile's keys may be shared out; 0: they may not."""

    def splits(self, num_tokens: int, num_heads: int, num_sms: int) -> bool:
        """Whether a step may have fewer tiles than the device has multiprocessors. Only then is
        a tile's work shared out: the kernel that can is slower by 6%."""
        return self.partial_floats > 0 and num_tokens * num_heads <= self.tile_rows * num_sms


@dataclass(frozen=True)
class DecodeConfig:
    """How the decode kernel fills a multiprocessor."""

    blocks_per_sm: int
    stages: int
    shared_bytes: int


def programs(spec: AttentionSpec, arch: str, portable: bool = False) -> list[Program]:
    """What PagedAttention needs compiled: the plan, decode, prefill and, where there is one,
    prefill that shares tiles out; in float32 the plan and one kernel for all."""
    plan = Program("attention_plan.cu")
    if spec.dtype == torch.float32:
        defines = {"HEAD_DIM": spec.head_dim, "GROUP": spec.group}
        return [plan, Program("attention_float.cu", defines)]
    config = decode_config(spec, arch)
    decode = spec.defines(STAGES=config.stages, MIN_BLOCKS_PER_SM=config.blocks_per_sm)
    if portable:
        decode["FORCE_CP_ASYNC"] = 1
    prefill = prefill_config(spec, arch, portable)
    variants = [{"SPLIT_KEYS": 0}, {"SPLIT_KEYS": 1}] if prefill.partial_floats else [{}]
    return [
        plan,
        Program("attention_decode.cu", decode),
        *(Program(prefill.source, spec.defines(**variant)) for variant in variants),
    ]


def decode_config(spec: AttentionSpec, arch: str) -> DecodeConfig:
    """Thread blocks on a multiprocessor and stages of their warps' rings.

    More than 128 KiB under way only makes the memory's queues longer, and small heads want more
    warps (docs/decisions/050); what the shared memory does not hold goes down to one thread block.
    """
    # CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": KiB of shared
    # memory a multiprocessor.
    sm_bytes = {"80": 164, "90": 228}.get(arch[3:5], 100) * 1024
    merge_bytes = DECODE_WARPS * spec.group * ((spec.head_dim + 4) * 4 + 8) + 16
    stage_bytes = DECODE_WARPS * (2 * spec.run_bytes + 8)
    for blocks_per_sm in (4, 2, 1) if spec.head_dim <= 64 else (2, 1):
        room = bytes_for(blocks_per_sm, sm_bytes) - merge_bytes
        useful = 128 * 1024 // (blocks_per_sm * DECODE_WARPS * 2 * spec.run_bytes)
        stages = min(room // stage_bytes, _MAX_STAGES, useful if blocks_per_sm > 1 else _MAX_STAGES)
        if stages >= (2 if blocks_per_sm > 1 else 1):
            least = bytes_for_at_most(blocks_per_sm, sm_bytes)
            shared_bytes = max(stages * stage_bytes + merge_bytes, least)
            return DecodeConfig(blocks_per_sm, stages, shared_bytes)
    raise KernelError(
        f"num_heads is {spec.num_heads} with {spec.num_kv_heads} KV heads of {spec.head_dim}: "
        f"more than the shared memory of {arch} holds"
    )


def prefill_config(spec: AttentionSpec, arch: str, portable: bool) -> PrefillConfig:
    """wgmma on Hopper, where the cache's columns are all of 128 bytes and 16-bit; else mma.sync."""
    dim = spec.head_dim
    if arch == "sm_90a" and not portable and not spec.fp8 and dim in (64, 128, 256):
        tile_keys, buffers = (64, 1) if dim > 128 else (128, 3)
        stages = 2
        shared = (buffers * 128 + 2 * stages * tile_keys) * dim * 2 + (4 * stages + 2 * buffers) * 8
        partial = TILE_WARPS * 32 * (dim // 2 + 4)
        return PrefillConfig("attention_prefill_wgmma.cu", 128, tile_keys, 384, 1, shared, partial)
    stage_blocks = 2 if dim > 128 else 4
    shared = 64 * dim * 2 + 2 * 2 * stage_blocks * spec.run_bytes
    return PrefillConfig("attention_prefill_mma.cu", 64, stage_blocks * 16, 128, 2, shared)
