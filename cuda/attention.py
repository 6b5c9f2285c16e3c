"""Paged attention of a mixed batch: planned once a step, launched once a layer.

A step's rows have one query token (decode) or several (prefill chunks, with or without tokens in
the cache already). `plan` makes the work lists of both on the device, so that nothing in a CUDA
graph depends on lengths; `run` attends one layer. The step's own keys and values stand in the
cache before `run`, in the order of cuda/include/kv_layout.cuh.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zllm.cuda.compiler import Program
from zllm.cuda.launcher import KernelLibrary
from zllm.errors import KernelError

BLOCK_TOKENS = 16
HEAD_DIMS = (64, 96, 128, 256)
MAX_GROUP = 16
MAX_ROWS = 4096
"""Rows of a step at most: the plan holds their prefix sums in shared memory."""

_SCALARS = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half", torch.float32: "float"}
_DECODE_WARPS = 4
_MAX_STAGES = 3
_MIN_SHARE = 8
"""Blocks of KV that a thread block takes at least: fewer would only be merged again."""
_SHARE_WORDS, _ROW_WORDS, _TILE_WORDS = 8, 4, 8


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
class _Prefill:
    """One of the prefill kernels and how it is launched."""

    source: str
    tile_rows: int
    threads: int
    blocks_per_sm: int
    shared_bytes: int


@dataclass(frozen=True)
class _DecodeConfig:
    """How the decode kernel fills a multiprocessor."""

    blocks_per_sm: int
    stages: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """What `plan` made of a step. The lists are overwritten by the next plan."""

    rows: Tensor
    q_start: Tensor
    kv_len: Tensor
    num_tokens: int
    max_tiles: int
    """Tiles of prefill rows at most; 0: every row has one token."""


class PagedAttention:
    """The attention of one model on one device, with its workspace.

    Plans and runs belong to one stream. Results do not depend on timing: the same inputs give the
    same bits.
    """

    def __init__(
        self,
        library: KernelLibrary,
        spec: AttentionSpec,
        *,
        max_rows: int,
        max_tokens: int,
        portable: bool = False,
    ) -> None:
        """`max_rows`, `max_tokens`: of a step, padding included. `portable` takes the path of
        sm_80 on any device."""
        if not 1 <= max_rows <= MAX_ROWS:
            raise KernelError(f"max_rows is {max_rows}: attention plans 1 to {MAX_ROWS} rows")
        self.spec = spec
        self._library = library
        self._pdl = library.pdl and not portable
        arch = library.compiler.arch
        self._config = decode_config(spec, arch)
        self._prefill = _prefill_kernel(spec, arch, portable)
        self._max_rows, self._max_tokens = max_rows, max_tokens
        self._num_shares = library.num_sms * self._config.blocks_per_sm
        self._plan = library.get("attention_plan.cu", "attention_plan")
        self._kernels = [
            library.get(program.source, program.source.removesuffix(".cu"), program.defines)
            for program in programs(spec, arch, portable)[1:]
        ]
        device = torch.device("cuda", library.device)

        def words(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._shares = words(self._num_shares, _SHARE_WORDS)
        self._decode_rows = words(max_rows, _ROW_WORDS)
        self._tiles = words(self._tile_limit(max_rows, max_tokens), _TILE_WORDS)
        self._arrivals = words(self._num_shares)
        partial_floats = 2 * self._num_shares * spec.group * (spec.head_dim + 2)
        self._partials = torch.zeros(partial_floats, dtype=torch.float32, device=device)

    def _tile_limit(self, rows: int, tokens: int) -> int:
        return tokens * self.spec.group // self._prefill.tile_rows + min(rows, tokens // 2 + 1)

    def plan(
        self,
        rows: Tensor,
        q_start: Tensor,
        kv_len: Tensor,
        *,
        num_tokens: int,
        decode_only: bool = False,
    ) -> AttentionWork:
        """Make the work lists of a step.

        rows, kv_len: int32 [R]; q_start: int32 [R + 1]; see runtime.ops.Batch. num_tokens: of the
        step, padding included. decode_only: no row has more than one token, so that `run` leaves
        the prefill kernel out.
        """
        device = self._shares.device
        for name, tensor, size in (
            ("rows", rows, rows.numel()),
            ("q_start", q_start, rows.numel() + 1),
            ("kv_len", kv_len, rows.numel()),
        ):
            _check(name, tensor, torch.int32, (size,), device)
        if rows.numel() > self._max_rows:
            raise KernelError(f"rows: {rows.numel()} rows, planned for {self._max_rows} at most")
        if num_tokens > self._max_tokens:
            raise KernelError(f"num_tokens is {num_tokens}: planned for {self._max_tokens} at most")
        max_tiles = 0 if decode_only else self._tile_limit(rows.numel(), num_tokens)
        work = AttentionWork(rows, q_start, kv_len, num_tokens, max_tiles)
        if self.spec.dtype != torch.float32:
            self._plan.launch(
                (1, 1, 1),
                (1024, 1, 1),
                (
                    rows,
                    q_start,
                    kv_len,
                    self._shares,
                    self._decode_rows,
                    self._tiles,
                    rows.numel(),
                    self._num_shares,
                    max_tiles,
                    self.spec.num_kv_heads,
                    self.spec.group,
                    self._prefill.tile_rows,
                    _MIN_SHARE,
                ),
                pdl=self._pdl,
            )
        return work

    def run(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        block_table: Tensor,
        work: AttentionWork,
        *,
        scale: float,
        out: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend one layer: q [P, Hq, D] -> [P, Hq * D] of the same dtype.

        keys, values: [num_blocks, Hkv, 16, D], only the blocks' stride free; block_table: int32
        [rows, max_blocks]; scale: of the scores before the softmax; k_scale, v_scale: float32 [1],
        what a float8 cache's entries are multiplied by. Tokens of no row are left as they are.
        """
        spec, device = self.spec, self._shares.device
        _check("q", q, spec.dtype, (work.num_tokens, spec.num_heads, spec.head_dim), device)
        if out is None:
            out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=device)
        _check("out", out, spec.dtype, (q.shape[0], q.shape[1] * q.shape[2]), device)
        stride = self._check_cache(keys, values)
        if block_table.dim() != 2 or block_table.stride(1) != 1:
            raise KernelError(
                f"block_table: shape {tuple(block_table.shape)} with strides "
                f"{block_table.stride()}: expected two dimensions, the last one contiguous"
            )
        _check_kind("block_table", block_table, torch.int32, device)
        if spec.fp8:
            if k_scale is None or v_scale is None:
                raise KernelError("k_scale, v_scale: a float8 cache needs both")
            _check("k_scale", k_scale, torch.float32, (1,), device)
            _check("v_scale", v_scale, torch.float32, (1,), device)
        if spec.dtype == torch.float32:
            self._run_float(q, out, keys, values, block_table, work, stride, scale)
            return out

        decode, prefill = self._kernels
        ends = (spec.num_kv_heads, stride * keys.itemsize, block_table.stride(0), scale)
        decode.launch(
            (self._num_shares, 1, 1),
            (_DECODE_WARPS * 32, 1, 1),
            (
                q,
                out,
                keys,
                values,
                block_table,
                self._shares,
                self._decode_rows,
                self._partials,
                self._arrivals,
                k_scale,
                v_scale,
                *ends,
            ),
            shared_bytes=self._config.shared_bytes,
            pdl=self._pdl,
        )
        if work.max_tiles:
            how = self._prefill
            tiles = (q, out, keys, values, block_table, self._tiles, k_scale, v_scale)
            most = self._library.num_sms * how.blocks_per_sm
            prefill.launch(
                (min(work.max_tiles * spec.num_kv_heads, most), 1, 1),
                (how.threads, 1, 1),
                (*tiles, work.max_tiles, *ends),
                shared_bytes=how.shared_bytes,
                pdl=self._pdl,
            )
        return out

    def _run_float(
        self,
        q: Tensor,
        out: Tensor,
        keys: Tensor,
        values: Tensor,
        block_table: Tensor,
        work: AttentionWork,
        stride: int,
        scale: float,
    ) -> None:
        spec = self.spec
        self._kernels[0].launch(
            (q.shape[0], -(-spec.num_heads // 4), 1),
            (128, 1, 1),
            (
                q,
                out,
                keys,
                values,
                block_table,
                work.rows,
                work.q_start,
                work.kv_len,
                work.rows.numel(),
                spec.num_kv_heads,
                stride,
                block_table.stride(0),
                scale,
            ),
            pdl=self._pdl,
        )

    def _check_cache(self, keys: Tensor, values: Tensor) -> int:
        """The stride between blocks, in elements."""
        spec = self.spec
        tail = (spec.num_kv_heads, BLOCK_TOKENS, spec.head_dim)
        inner = (BLOCK_TOKENS * spec.head_dim, spec.head_dim, 1)
        for name, cache in (("keys", keys), ("values", values)):
            _check_kind(name, cache, spec.kv_dtype, self._shares.device)
            if cache.shape[1:] != tail or cache.stride()[1:] != inner or cache.data_ptr() % 16:
                raise KernelError(
                    f"{name}: shape {tuple(cache.shape)} with strides {cache.stride()}: expected "
                    f"[blocks, {', '.join(map(str, tail))}], blocks contiguous, aligned to 16 bytes"
                )
        stride = keys.stride(0)
        if values.stride(0) != stride:
            raise KernelError(
                f"values: blocks lie {values.stride(0)} elements apart, those of keys {stride}"
            )
        if stride * keys.itemsize >= 2**31 or stride * keys.itemsize % 16:
            raise KernelError(
                f"keys: blocks lie {stride} elements apart: expected a multiple of 16 bytes "
                "below 2 GiB"
            )
        return stride


def programs(spec: AttentionSpec, arch: str, portable: bool = False) -> list[Program]:
    """What PagedAttention needs compiled: the plan, then decode and prefill (float32: one)."""
    plan = Program("attention_plan.cu")
    if spec.dtype == torch.float32:
        defines = {"HEAD_DIM": spec.head_dim, "GROUP": spec.group}
        return [plan, Program("attention_float.cu", defines)]
    config = decode_config(spec, arch)
    decode = spec.defines(STAGES=config.stages, MIN_BLOCKS_PER_SM=config.blocks_per_sm)
    if portable:
        decode["FORCE_CP_ASYNC"] = 1
    return [
        plan,
        Program("attention_decode.cu", decode),
        Program(_prefill_kernel(spec, arch, portable).source, spec.defines()),
    ]


def decode_config(spec: AttentionSpec, arch: str) -> _DecodeConfig:
    """Thread blocks on a multiprocessor and stages of their warps' rings.

    More than 128 KiB under way only makes the memory's queues longer, and small heads want more
    warps (docs/decisions/050); what the shared memory does not hold goes down to one thread block.
    """
    # CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": KiB of shared
    # memory a multiprocessor, of which each thread block costs one more.
    sm_kib = {"80": 164, "90": 228}.get(arch[3:5], 100)
    merge_bytes = _DECODE_WARPS * spec.group * ((spec.head_dim + 4) * 4 + 8) + 16
    stage_bytes = _DECODE_WARPS * (2 * spec.run_bytes + 8)
    for blocks_per_sm in (4, 2, 1) if spec.head_dim <= 64 else (2, 1):
        room = sm_kib * 1024 // blocks_per_sm - 1024 - merge_bytes
        useful = 128 * 1024 // (blocks_per_sm * _DECODE_WARPS * 2 * spec.run_bytes)
        stages = min(room // stage_bytes, _MAX_STAGES, useful if blocks_per_sm > 1 else _MAX_STAGES)
        if stages >= (2 if blocks_per_sm > 1 else 1):
            return _DecodeConfig(blocks_per_sm, stages, stages * stage_bytes + merge_bytes)
    raise KernelError(
        f"num_heads is {spec.num_heads} with {spec.num_kv_heads} KV heads of {spec.head_dim}: "
        f"more than the shared memory of {arch} holds"
    )


def _prefill_kernel(spec: AttentionSpec, arch: str, portable: bool) -> _Prefill:
    """wgmma on Hopper, where the cache's columns are all of 128 bytes and 16-bit; else mma.sync."""
    dim = spec.head_dim
    if arch == "sm_90a" and not portable and not spec.fp8 and dim in (64, 128, 256):
        tile_keys, buffers = (64, 1) if dim > 128 else (128, 3)
        stages = 2
        shared = (buffers * 128 + 2 * stages * tile_keys) * dim * 2 + (4 * stages + 2 * buffers) * 8
        return _Prefill("attention_prefill_wgmma.cu", 128, 384, 1, shared)
    stage_blocks = 2 if dim > 128 else 4
    shared = 64 * dim * 2 + 2 * 2 * stage_blocks * spec.run_bytes
    return _Prefill("attention_prefill_mma.cu", 64, 128, 2, shared)


def _check_kind(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype != dtype or tensor.device != device:
        raise KernelError(
            f"{name}: {tensor.dtype} on {tensor.device}: expected {dtype} on {device}"
        )


def _check(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    _check_kind(name, tensor, dtype, device)
    if tensor.shape != shape or not tensor.is_contiguous():
        raise KernelError(
            f"{name}: shape {tuple(tensor.shape)} with strides {tensor.stride()}: "
            f"expected {shape}, contiguous"
        )
