"""Copies of whole cache blocks, inside the pool and to and from pinned memory (blocks.cu)."""

from __future__ import annotations

from torch import Tensor

from zllm.cuda.checks import INT, require
from zllm.cuda.compiler import Program
from zllm.cuda.launcher import Int64, KernelLibrary
from zllm.errors import KernelError

PROGRAM = Program("blocks.cu")


def copy_blocks(
    kernels: KernelLibrary, target: Tensor, source: Tensor, pairs: Tensor, count: Tensor
) -> None:
    """target[pairs[i, 1]] = source[pairs[i, 0]] for i < count.

    target, source: [blocks, runs, width], each run contiguous, blocks and runs at any stride: on
    the device or in pinned host memory, which the kernel reads and writes through the bus. pairs:
    int32 [2 * n], count: int32 [1], both on the device. No pair's target may be the source or
    target of another.
    """
    strides = []
    for name, tensor in (("target", target), ("source", source)):
        if not (tensor.is_cuda or tensor.is_pinned()):
            raise KernelError(f"{name} is on {tensor.device}: it must be on the GPU or pinned")
        if (
            tensor.dim() != 3
            or tensor.dtype != target.dtype
            or tensor.shape[1:] != target.shape[1:]
        ):
            raise KernelError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}: target and source must be "
                "[blocks, runs, width] of one dtype, with the same runs and width"
            )
        size = tensor.element_size()
        units = [tensor.stride(0) * size, tensor.stride(1) * size, tensor.shape[2] * size]
        if tensor.stride(2) != 1 or tensor.data_ptr() % 16 or any(unit % 16 for unit in units):
            raise KernelError(
                f"{name} has strides {list(tensor.stride())} of {size} bytes: runs must be "
                "contiguous and everything a multiple of 16 bytes"
            )
        strides += [Int64(units[0] // 16), Int64(units[1] // 16)]
    require("pairs", pairs, INT, (None,), kernels.device)
    require("count", count, INT, (1,), kernels.device)
    runs, run_vecs = target.shape[1], target.shape[2] * target.element_size() // 16
    kernels.get(PROGRAM.source, "copy_blocks").launch(
        (4 * kernels.num_sms, 1, 1),
        (256, 1, 1),
        (target, source, pairs, count, runs, run_vecs, strides[2], strides[3], *strides[:2]),
        pdl=kernels.pdl,
    )
