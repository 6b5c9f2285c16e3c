"""Paged attention of a mixed batch: planned once a step, launched once a layer.

A step's rows have one query token (decode) or several (prefill chunks, with or without tokens in
the cache already). `plan` says what a step is, `make_lists` makes its work lists, on the device,
so that nothing in a CUDA graph depends on lengths, and `run` attends one layer. The step's own keys
and values stand in the cache before `run`, in the order of cuda/include/kv_layout.cuh.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zllm.cuda.attention_spec import (
    BLOCK_TOKENS,
    DECODE_WARPS,
    TILE_WARPS,
    AttentionSpec,
    decode_config,
    prefill_config,
    programs,
)
from zllm.cuda.launcher import KernelLibrary
from zllm.errors import KernelError

__all__ = ["AttentionSpec", "AttentionWork", "PagedAttention", "programs"]

MAX_ROWS = 4096
"""Rows of a step at most: the plan holds their prefix sums in shared memory."""

_MIN_SHARE = 8
"""Blocks of KV that a thread block takes at least: fewer would only be merged again."""
_GAP_BYTES, _MOST_GAP = 48 * 1024, 10
"""What a pair of a row and a KV head costs beside its blocks, as measured: the time of reading that
many bytes, and at most that many blocks."""
_SHARE_WORDS, _ROW_WORDS, _TILE_WORDS = 8, 4, 8


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """What `plan` made of a step."""

    rows: Tensor
    q_start: Tensor
    kv_len: Tensor
    num_tokens: int
    max_tiles: int
    """Tiles of prefill rows at most; 0: every row has one token."""
    split: bool
    """Whether tiles may be shared out along their keys."""


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
            raise KernelError(
                f"max_rows is {max_rows}: attention plans 1 to {MAX_ROWS} rows; give "
                "--max-num-seqs in that range"
            )
        self.spec = spec
        self._library = library
        self._pdl = library.pdl and not portable
        arch = library.compiler.arch
        self._planned: AttentionWork | None = None
        self._config = decode_config(spec, arch)
        self._prefill = prefill_config(spec, arch, portable)
        self._max_rows, self._max_tokens = max_rows, max_tokens
        self._tile_parts = 2 * library.num_sms // spec.num_kv_heads + 1
        self._num_shares = library.num_sms * self._config.blocks_per_sm
        self._gap = min(_MOST_GAP, _GAP_BYTES // (2 * spec.run_bytes))
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
        self._tiles = words(self._tile_limit(max_rows, max_tokens, True), _TILE_WORDS)
        self._arrivals = words(self._num_shares)
        # A step's tiles have at most 1.5 parts a multiprocessor: see attention_plan.cu.
        parts = 2 * library.num_sms if self._prefill.partial_floats else 0
        self._tile_arrivals = words(parts, TILE_WARPS)
        self._tile_partials = torch.zeros(
            parts, self._prefill.partial_floats, dtype=torch.float32, device=device
        )
        partial_floats = 2 * self._num_shares * spec.group * (spec.head_dim + 2)
        self._partials = torch.zeros(partial_floats, dtype=torch.float32, device=device)

    def _tile_limit(self, rows: int, tokens: int, split: bool) -> int:
        whole = tokens * self.spec.group // self._prefill.tile_rows + min(rows, tokens // 2 + 1)
        return whole + (self._tile_parts if split else 0)

    def plan(
        self,
        rows: Tensor,
        q_start: Tensor,
        kv_len: Tensor,
        *,
        num_tokens: int,
        decode_only: bool = False,
    ) -> AttentionWork:
        """What `make_lists` and `run` need to know of a step; nothing is launched yet.

        rows, kv_len: int32 [R]; q_start: int32 [R + 1]; see runtime.ops.Batch. num_tokens: of the
        step, padding included. decode_only: no row has more than one token, so that `run` leaves
        the prefill kernel out. What the cache holds of decode rows, their new tokens apart, stands
        there before `make_lists`: `run` reads it without waiting for what lies between.
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
        split = self._prefill.splits(num_tokens, self.spec.num_heads, self._library.num_sms)
        max_tiles = 0 if decode_only else self._tile_limit(rows.numel(), num_tokens, split)
        return AttentionWork(rows, q_start, kv_len, num_tokens, max_tiles, split)

    def make_lists(self, work: AttentionWork) -> None:
        """Make a step's lists, over those of another; the first `run` does it where nobody has.

        What is launched behind it starts when it has ended, and so may read what was written before
        it without waiting for its own predecessor (`lets_read_early`).
        """
        self._planned = work
        if self.spec.dtype == torch.float32:
            return
        self._plan.launch(
            (1, 1, 1),
            (1024, 1, 1),
            (
                work.rows,
                work.q_start,
                work.kv_len,
                self._shares,
                self._decode_rows,
                self._tiles,
                work.rows.numel(),
                self._num_shares,
                work.max_tiles,
                self.spec.num_kv_heads,
                self.spec.group,
                self._prefill.tile_rows,
                self._prefill.tile_keys,
                self._library.num_sms if work.split else 0,
                max(_MIN_SHARE, self._gap + 1),  # a share must be more than a gap
                self._gap,
            ),
            pdl=self._pdl,
        )

    def lets_read_early(self, work: AttentionWork) -> bool:
        """Whether what is launched now starts after the step's lists were made."""
        return work is self._planned and self.spec.dtype != torch.float32

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
        if work is not self._planned:
            self.make_lists(work)
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

        decode, *prefills = self._kernels
        sizes = (spec.num_kv_heads, stride * keys.itemsize, block_table.stride(0))
        decode.launch(
            (self._num_shares, 1, 1),
            (DECODE_WARPS * 32, 1, 1),
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
                *sizes,
                self._gap,
                scale,
            ),
            shared_bytes=self._config.shared_bytes,
            pdl=self._pdl,
        )
        if work.max_tiles:
            how = self._prefill
            tiles = (q, out, keys, values, block_table, self._tiles, k_scale, v_scale)
            merge = (self._tile_partials, self._tile_arrivals) if how.partial_floats else ()
            most = self._library.num_sms * how.blocks_per_sm
            prefills[work.split].launch(
                (min(work.max_tiles * spec.num_kv_heads, most), 1, 1),
                (how.threads, 1, 1),
                (*tiles, work.max_tiles, *sizes, scale, *merge),
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
