"""Sampling on the device (kernels/sampler.cu, logits.cu and logprobs.cu).

The position that keys a row's noise, and the length that min_tokens compares, is
positions[sample_tokens] + 1: the length of the sequence so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zllm.cuda.checks import INT, SCALARS, require, require_pinned
from zllm.cuda.compiler import Program
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.logit_chunks import CHUNK, LogitChunks
from zllm.errors import KernelError

_FLOAT = (torch.float32,)
_COUNTS = (torch.int16,)
_MAX_SPLITS = 64
_CHOOSE_THREADS = 1024
_MAX_VOCAB = 1 << 18


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Which rows a step samples and where their parameters stand; int32 on the device."""

    sample_rows: Tensor
    """[S] device row of each."""
    sample_tokens: Tensor
    """[S] index of its last token in `positions`."""
    positions: Tensor
    """[P] position of each token of the step."""
    params: Tensor
    """[max_num_seqs + 1, PARAM_WORDS]."""


@dataclass(frozen=True, slots=True)
class Bias:
    """What is added to the logits of a row's ids."""

    ids: Tensor
    """[max_num_seqs + 1, max_bias] int32."""
    values: Tensor
    """[max_num_seqs + 1, max_bias] float32."""
    counts: Tensor
    """[max_num_seqs + 1] int32: how many of them the row has."""


@dataclass(frozen=True, slots=True)
class HostTokens:
    """Where a step's tokens reach the host without a copy, once the stream has come past them. Two
    halves take turns by the step's number, so that one step's may be read while the next writes."""

    tokens: Tensor
    """[2, at least S] int32 in pinned memory: of even and of odd steps."""
    step: Tensor
    """[1] int32 on the device: the step's number."""


class Logprobs(NamedTuple):
    """Natural log-probabilities of S chosen tokens, and of the N most likely, best first."""

    values: Tensor
    """[S] float32; NaN where the token is -1."""
    ranks: Tensor
    """[S] int32; 1 is the most likely, 0 where the token is -1."""
    top_ids: Tensor
    """[S, N] int32."""
    top_values: Tensor
    """[S, N] float32."""


def programs(dtype: torch.dtype, vocab: int, arena_macros: Mapping[str, int]) -> list[Program]:
    """What Sampler launches, for parallel compilation. `arena_macros`: the arena's P_ numbers and
    PARAM_WORDS."""
    if not 0 < vocab < _MAX_VOCAB:
        raise KernelError(f"vocab is {vocab}: at most {_MAX_VOCAB - 1} tokens can be sampled")
    defines: dict[str, str | int] = {**arena_macros, "SCALAR": SCALARS[dtype], "VOCAB": vocab}
    return [Program(name, defines) for name in ("sampler.cu", "logits.cu", "logprobs.cu")]


class Sampler:
    """The sampling kernels for one vocabulary, with their scratch for up to `max_rows` rows."""

    def __init__(
        self,
        kernels: KernelLibrary,
        arena_macros: Mapping[str, int],
        dtype: torch.dtype,
        vocab: int,
        max_rows: int,
    ) -> None:
        """`dtype`: of the logits."""
        sampler, logits, logprobs = programs(dtype, vocab, arena_macros)
        self._scan = kernels.get(sampler.source, "scan_logits", sampler.defines)
        self._choose = kernels.get(sampler.source, "choose_tokens", sampler.defines)
        self._edit = kernels.get(logits.source, "edit_logits", logits.defines)
        self._count = kernels.get(logits.source, "count_tokens", logits.defines)
        self._logprobs = kernels.get(logprobs.source, "logprobs", logprobs.defines)
        self._device = kernels.device
        self._num_sms = kernels.num_sms
        self._pdl = kernels.pdl
        self._param_words = arena_macros["PARAM_WORDS"]
        self._temperature = arena_macros["P_TEMPERATURE"]
        self.dtype = dtype
        self.vocab = vocab
        self.max_rows = max_rows
        chunks = -(-vocab // CHUNK)
        padded = -(-chunks // 4) * 4  # to whole groups
        where = f"cuda:{kernels.device}"
        self._chunks = torch.empty(max_rows, padded, 2, dtype=torch.float32, device=where)
        # struct Shared of sampler.cu: histogram, token list, weights, chunks and the small rest.
        self._shared_bytes = 2048 * 8 + 4096 * 8 + 256 * 8 + -(-chunks // 8) * 16 + 1024

    def sample(
        self,
        logits: Tensor,
        rows: SampledRows,
        tokens: Tensor,
        last_token: Tensor,
        counts: Tensor | None = None,
        host: HostTokens | None = None,
        *,
        scanned: bool = False,
    ) -> None:
        """[S, V] -> tokens int32 [S], and last_token[row] of each: greedy where the temperature is
        0, else Gumbel-max over what min-p, then top-k, then top-p allow. -1 where a row's logits
        hold NaN or +inf, or are all -inf.

        counts: int16 [max_num_seqs + 1, V] or None; counts the sampled tokens for `edit`. `host`
        gets the tokens, too. `scanned`: what made the logits has filled `chunks(rows)`.
        """
        num = self._check(logits, rows)
        require("tokens", tokens, INT, (num,), self._device)
        require("last_token", last_token, INT, (rows.params.shape[0],), self._device)
        self._check_counts(counts, rows.params.shape[0])
        to_host: tuple[Tensor | None, Tensor | None, int] = (None, None, 0)
        if host is not None:
            self._check_host(host, num)
            to_host = host.tokens, host.step, host.tokens.shape[1]
        where = (rows.params, rows.sample_rows, rows.sample_tokens, rows.positions)
        if not scanned:
            self._scan.launch(
                (self._splits(num), num, 1),
                (256, 1, 1),
                (self._chunks, logits, *where),
                pdl=self._pdl,
            )
        self._choose.launch(
            (num, 1, 1),
            (_CHOOSE_THREADS, 1, 1),
            (tokens, last_token, counts, self._chunks, logits, *where, *to_host),
            shared_bytes=self._shared_bytes,
            pdl=self._pdl,
        )

    def chunks(self, rows: SampledRows) -> LogitChunks:
        """What the product that makes the rows' logits may fill."""
        num = len(rows.sample_rows)
        return LogitChunks(self._chunks[:num], rows.sample_rows, rows.params, self._temperature)

    def edit(
        self,
        logits: Tensor,
        rows: SampledRows,
        *,
        counts: Tensor | None = None,
        bias: Bias | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """[S, V] -> [S, V]: repetition, presence and frequency penalties by `counts`, then `bias`,
        then -inf for the end ids of rows shorter than their minimum. In place unless `out` is
        given, as it must be where the unmodified logits are still needed."""
        num = self._check(logits, rows)
        table_rows = rows.params.shape[0]
        out = logits if out is None else out
        require("out", out, (self.dtype,), (num, self.vocab), self._device)
        self._check_counts(counts, table_rows)
        tables: tuple[Tensor | None, ...] = (None, None, None)
        max_bias = 0
        if bias is not None:
            max_bias = bias.ids.shape[-1]
            require("bias.ids", bias.ids, INT, (table_rows, max_bias), self._device)
            require("bias.values", bias.values, _FLOAT, (table_rows, max_bias), self._device)
            require("bias.counts", bias.counts, INT, (table_rows,), self._device)
            tables = (bias.ids, bias.values, bias.counts)
        where = (rows.params, rows.sample_rows, rows.sample_tokens, rows.positions)
        self._edit.launch(
            (self._splits(num), num, 1),
            (256, 1, 1),
            (out, logits, counts, *tables, max_bias, *where),
            pdl=self._pdl,
        )
        return out

    def count_tokens(self, counts: Tensor, row: int, tokens: Tensor, prompt_length: int) -> None:
        """Set counts[row] (int16) to what `tokens` (int32 [n]) hold: the first `prompt_length` are
        the prompt's, the others were sampled. For a row that starts, or starts again, with
        penalties."""
        require("counts", counts, _COUNTS, (None, self.vocab), self._device)
        require("tokens", tokens, INT, (None,), self._device)
        counts[row].zero_()
        length = tokens.shape[0]
        grid = min(-(-length // 256), 4 * self._num_sms)
        self._count.launch((grid, 1, 1), (256, 1, 1), (counts, tokens, row, length, prompt_length))

    def allocate_logprobs(self, num: int, num_top: int) -> Logprobs:
        """For `num` rows and the `num_top` most likely tokens of each."""
        if not 0 <= num_top <= self.vocab:
            raise KernelError(f"num_top is {num_top}: it must be in [0, {self.vocab}]")
        where = f"cuda:{self._device}"
        return Logprobs(
            torch.empty(num, dtype=torch.float32, device=where),
            torch.empty(num, dtype=torch.int32, device=where),
            torch.empty(num, num_top, dtype=torch.int32, device=where),
            torch.empty(num, num_top, dtype=torch.float32, device=where),
        )

    def logprobs(self, logits: Tensor, chosen: Tensor, out: Logprobs) -> None:
        """[S, V], int32 [S] -> `out`, of S rows."""
        require("logits", logits, (self.dtype,), (None, self.vocab), self._device)
        num, num_top = logits.shape[0], out.top_ids.shape[-1]
        require("chosen", chosen, INT, (num,), self._device)
        require("out.values", out.values, _FLOAT, (num,), self._device)
        require("out.ranks", out.ranks, INT, (num,), self._device)
        require("out.top_ids", out.top_ids, INT, (num, num_top), self._device)
        require("out.top_values", out.top_values, _FLOAT, (num, num_top), self._device)
        self._logprobs.launch(
            (num, 1, 1), (1024, 1, 1), (*out, logits, chosen, num_top), pdl=self._pdl
        )

    def _splits(self, rows: int) -> int:
        """Slices of a row, so that all multiprocessors have about three thread blocks each."""
        wanted = -(-3 * self._num_sms // rows) if rows else 1
        return max(1, min(wanted, _MAX_SPLITS, self.vocab // (CHUNK * 32)))

    def _check(self, logits: Tensor, rows: SampledRows) -> int:
        require("logits", logits, (self.dtype,), (None, self.vocab), self._device)
        num = logits.shape[0]
        if num > self.max_rows:
            raise KernelError(f"logits has {num} rows: this sampler was made for {self.max_rows}")
        if logits.data_ptr() % 16:
            raise KernelError(f"logits is at {logits.data_ptr():#x}: it must be aligned to 16")
        require("params", rows.params, INT, (None, self._param_words), self._device)
        require("sample_rows", rows.sample_rows, INT, (num,), self._device)
        require("sample_tokens", rows.sample_tokens, INT, (num,), self._device)
        require("positions", rows.positions, INT, (None,), self._device)
        return num

    def _check_host(self, host: HostTokens, count: int) -> None:
        require("host.step", host.step, INT, (1,), self._device)
        tokens = host.tokens
        require_pinned("host.tokens", tokens, (2, None))
        if tokens.shape[1] < count:
            raise KernelError(
                f"host.tokens holds {tokens.shape[1]} tokens of a step: {count} are sampled"
            )

    def _check_counts(self, counts: Tensor | None, table_rows: int) -> None:
        if counts is not None:
            require("counts", counts, _COUNTS, (table_rows, self.vocab), self._device)
