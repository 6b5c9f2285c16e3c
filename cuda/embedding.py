"""Rows of a matrix by index (kernels/embedding.cu)."""

from __future__ import annotations

from torch import Tensor

from zllm.cuda.checks import FLOATS, INT, require, require_vectors
from zllm.cuda.compiler import Program
from zllm.cuda.launcher import KernelLibrary

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
