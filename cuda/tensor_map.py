"""Tensor maps: how the copy engine of sm_90 sees a matrix, encoded by the driver (CUtensorMap)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zllm.errors import KernelError

try:
    from cuda.bindings import driver
except ImportError:  # said by Compiler, with the remedy, before any kernel can exist
    driver = None


def encode_boxes(
    base: Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
) -> Any:
    """The map of a tensor of 16-bit floats at `base` for copies of `box` to swizzled shared memory.

    `sizes` and `box` are in elements, innermost dimension first; `strides` in elements, of every
    dimension but the innermost. A box's innermost run is 64 or 128 bytes: that is its swizzle.
    What lies outside `sizes` is read as zero.
    """
    kinds = driver.CUtensorMapDataType
    kind = {
        torch.bfloat16: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        torch.float16: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    }[base.dtype]
    swizzles = driver.CUtensorMapSwizzle
    swizzle = {
        64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
        128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
    }[box[0] * base.element_size()]
    status, encoded = driver.cuTensorMapEncodeTiled(
        kind,
        len(sizes),
        base.data_ptr(),
        [driver.cuuint64_t(size) for size in sizes],
        [driver.cuuint64_t(stride * base.element_size()) for stride in strides],
        [driver.cuuint32_t(length) for length in box],
        [driver.cuuint32_t(1)] * len(sizes),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise KernelError(
            f"no tensor map of {tuple(sizes)} with strides {tuple(strides)} and box {tuple(box)}: "
            f"{driver.cuGetErrorName(status)[1].decode()}"
        )
    return encoded


class TensorMaps:
    """Encoded maps, kept by what they say: encoding one takes longer than a launch."""

    _MOST = 4096

    def __init__(self) -> None:
        self._maps: dict[tuple[Any, ...], Any] = {}

    def get(
        self, base: Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
    ) -> Any:
        """`encode_boxes` of the arguments."""
        key = (base.data_ptr(), base.dtype, *sizes, *strides, *box)
        found = self._maps.get(key)
        if found is None:
            if len(self._maps) >= self._MOST:
                self._maps.clear()
            found = self._maps[key] = encode_boxes(base, sizes, strides, box)
        return found
