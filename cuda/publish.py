"""Sampled tokens to the host without a copy (kernels/publish.cu)."""

from __future__ import annotations

from torch import Tensor

from zllm.cuda.checks import INT, require
from zllm.cuda.compiler import Program
from zllm.cuda.launcher import KernelLibrary
from zllm.errors import KernelError

_THREADS = 256


def program(step_word: int) -> Program:
    """`step_word`: which word of the arena holds the step's number."""
    return Program("publish.cu", {"H_STEP": step_word})


def publish(
    kernels: KernelLibrary, host: Tensor, tokens: Tensor, arena: Tensor, step_word: int
) -> None:
    """tokens int32 [S] -> host[step % 2, :S], where `host` is int32 [2, capacity], pinned; the
    step's number is read from `arena` on the device. Done when the stream has come past it."""
    require("tokens", tokens, INT, (None,), kernels.device)
    require("arena", arena, INT, (None,), kernels.device)
    count = tokens.shape[0]
    if not host.is_pinned() or host.dtype not in INT or host.dim() != 2 or host.shape[0] != 2:
        raise KernelError(
            f"host is {host.dtype} {list(host.shape)}, pinned: {host.is_pinned()}; it must be "
            "int32 [2, capacity] in pinned memory"
        )
    if host.shape[1] < count:
        raise KernelError(f"host holds {host.shape[1]} tokens of a step: {count} were sampled")
    which = program(step_word)
    kernels.get(which.source, "publish", which.defines).launch(
        (-(-count // _THREADS), 1, 1),
        (_THREADS, 1, 1),
        (host, tokens, arena, count, host.shape[1]),
        pdl=kernels.pdl,
    )
