"""The gated activation on the device (kernels/activation.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from zllm.cuda.checks import FLOATS, SCALARS, require, require_vectors
from zllm.cuda.compiler import Program
from zllm.cuda.launcher import KernelLibrary
from zllm.errors import KernelError

_THREADS = 256


def program(dtype: torch.dtype, inter: int) -> Program:
    return Program("activation.cu", {"SCALAR": SCALARS[dtype], "INTER": inter, "THREADS": _THREADS})


def silu_mul(kernels: KernelLibrary, gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """[P, 2 * I] -> [P, I]: silu(first half) * second half, float32 inside."""
    require("gate_up", gate_up, FLOATS, (None, None), kernels.device)
    rows, both = gate_up.shape
    inter = both // 2
    if both % 2 or inter * gate_up.element_size() % 16:
        raise KernelError(
            f"gate_up has {both} columns of {gate_up.dtype}: each half must be a multiple of 16 "
            "bytes"
        )
    require_vectors("gate_up", gate_up)
    if out is None:
        out = gate_up.new_empty(rows, inter)
    else:
        require("out", out, (gate_up.dtype,), (rows, inter), kernels.device)
        require_vectors("out", out)
    vectors = rows * inter * gate_up.element_size() // 16
    # Four vectors a thread once every multiprocessor is full without.
    share = 4 if vectors >= kernels.num_sms * 2048 * 4 else 1
    which = program(gate_up.dtype, inter)
    kernel = kernels.get(which.source, f"silu_mul_{share}", which.defines)
    grid = -(-vectors // (_THREADS * share))
    kernel.launch((grid, 1, 1), (_THREADS, 1, 1), (out, gate_up, rows), pdl=kernels.pdl)
    return out
