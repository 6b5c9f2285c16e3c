"""What a wrapper asks of its arguments before their addresses reach a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from zllm.errors import KernelError

SCALARS = {
    torch.bfloat16: "__nv_bfloat16",
    torch.float16: "__half",
    torch.float32: "float",
    torch.float8_e4m3fn: "__nv_fp8_e4m3",
}
"""The name that a torch dtype has in the sources."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INT = (torch.int32,)


Shape = tuple[int | None, ...]
"""None is any size."""


def require(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: Shape, device: int
) -> None:
    """`tensor` is contiguous, on CUDA device `device`, of one of `dtypes` and of `shape`.
    KernelError names the argument and says what it is instead."""
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise KernelError(f"{name} is {tensor.dtype}: it must be {wanted}")
    if not _has(tensor, shape):
        raise KernelError(f"{name} has shape {list(tensor.shape)}: it must be {_text(shape)}")
    if not tensor.is_cuda or tensor.get_device() != device:
        raise KernelError(f"{name} is on {tensor.device}: it must be on cuda:{device}")
    if not tensor.is_contiguous():
        raise KernelError(f"{name} has strides {list(tensor.stride())}: it must be contiguous")


def require_pinned(name: str, tensor: Tensor, shape: Shape) -> None:
    """`tensor` is contiguous int32 of `shape` in the host's pinned memory, which kernels reach by
    its address there. KernelError as above."""
    fits = tensor.dtype in INT and _has(tensor, shape) and tensor.is_contiguous()
    if not fits or not tensor.is_pinned():
        raise KernelError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}, pinned: {tensor.is_pinned()}; it must "
            f"be int32 {_text(shape)}, contiguous, in pinned memory"
        )


def _has(tensor: Tensor, shape: Shape) -> bool:
    return tensor.dim() == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )


def _text(shape: Shape) -> str:
    return f"[{', '.join('any' if n is None else str(n) for n in shape)}]"


def require_vectors(name: str, tensor: Tensor) -> None:
    """The rows of `tensor` start and end on 16 bytes, as the kernels' loads do."""
    if tensor.shape[-1] * tensor.element_size() % 16 or tensor.data_ptr() % 16:
        raise KernelError(
            f"{name} has rows of {tensor.shape[-1]} {tensor.dtype} at {tensor.data_ptr():#x}: "
            "rows must be multiples of 16 bytes, aligned to 16"
        )
