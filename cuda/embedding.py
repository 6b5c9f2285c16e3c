"""Rows of a matrix by index (kernels/embedding.cu), also with what the product behind a norm needs
of them (kernels/norm.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from zllm.cuda import norm
from zllm.cuda.checks import FLOATS, INT, require, require_vectors
from zllm.cuda.compiler import Program
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.linear import ScaledRows

PROGRAM = Program("embedding.cu")


def take_rows(
    kernels: KernelLibrary, table: Tensor, index: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """[N, H], [P] int32 -> [P, H]: the rows of the table; zeros for an index outside [0, N)."""
    require("table", table, FLOATS, (None, None), kernels.device)
    require_vectors("table", table)
    require("index", index, INT, (None,), kernels.device)
    num_rows, width = table.shape
    count = index.shape[0]
    if out is None:
        out = table.new_empty(count, width)
    else:
        require("out", out, (table.dtype,), (count, width), kernels.device)
        require_vectors("out", out)
    vectors = width * table.element_size() // 16
    threads = min(256, -(-vectors // 32) * 32)
    parts = min(-(-vectors // threads), 8)
    kernels.get(PROGRAM.source, "take_rows").launch(
        (count, parts, 1), (threads, 1, 1), (out, table, index, num_rows, vectors), pdl=kernels.pdl
    )
    return out


embed = take_rows


def embed_scaled(
    kernels: KernelLibrary,
    table: Tensor,
    tokens: Tensor,
    gains: Tensor,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, ScaledRows]:
    """`embed` of [N, H] and [P] int32, and what `SkinnyLinear.linear_of_scaled` takes instead of
    rms_norm of that with `gains` [H]. bfloat16, as rows * gains must not overflow."""
    device = kernels.device
    require("table", table, (torch.bfloat16,), (None, None), device)
    require_vectors("table", table)
    require("tokens", tokens, INT, (None,), device)
    (num_rows, hidden), count = table.shape, tokens.shape[0]
    require("gains", gains, (table.dtype,), (hidden,), device)
    require_vectors("gains", gains)
    scaled = table.new_empty(count, hidden)
    if out is None:
        out = table.new_empty(count, hidden)
    else:
        require("out", out, (table.dtype,), (count, hidden), device)
        require_vectors("out", out)
    squares = torch.empty(1, count, dtype=torch.float32, device=table.device)
    which = norm.program(table.dtype, hidden, count)
    kernels.get(which.source, "embed_scaled", which.defines).launch(
        (count, 1, 1),
        (int(which.defines["THREADS"]), 1, 1),
        (out, scaled, squares, table, gains, tokens, num_rows),
        pdl=kernels.pdl,
    )
    return out, ScaledRows(scaled, squares)
