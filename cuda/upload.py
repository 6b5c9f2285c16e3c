"""A step's arena to the device before its first kernel: one asynchronous copy from pinned memory.

torch's own copy of a slice costs ten times as much of the host's time: it makes two views, and
notes the pinned memory's use in its allocator. The arena outlives its copy by itself: it is
written again only once its step has been collected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zllm.cuda.launcher import check_status
from zllm.errors import KernelError


class Upload:
    """Copies the first words of a pinned int32 tensor to a device tensor of the same size."""

    def __init__(self, source: Tensor, target: Tensor) -> None:
        for name, tensor, fits in (
            ("source", source, source.is_pinned()),
            ("target", target, target.is_cuda and target.shape == source.shape),
        ):
            if not fits or tensor.dtype != torch.int32 or not tensor.is_contiguous():
                raise KernelError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}: an upload "
                    "goes from pinned int32 to int32 of the same size on the GPU"
                )
        # Imported here, since this module is also read where there is no GPU.
        from cuda.bindings import driver

        self._copy = driver.cuMemcpyHtoDAsync
        self._tensors = source, target
        self._source, self._target = source.data_ptr(), target.data_ptr()
        self._words, self._device = source.numel(), target.get_device()

    def __call__(self, num_words: int) -> None:
        """Start the copy on torch's current stream of the device."""
        if num_words > self._words:
            raise KernelError(f"num_words is {num_words}: the arena has {self._words}")
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        (status,) = self._copy(self._target, self._source, 4 * num_words, stream)
        if status:
            check_status(status, f"{num_words} words of the arena were not copied")
