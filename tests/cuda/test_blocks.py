"""Block copies inside the pool and to and from pinned memory."""

from __future__ import annotations

import pytest
import torch

from zllm.cuda.blocks import copy_blocks
from zllm.cuda.launcher import KernelLibrary
from zllm.errors import KernelError

pytestmark = pytest.mark.gpu


def _int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("layout", ["block-major", "layer-major"])
@pytest.mark.parametrize("width", [pytest.param(256, id="small"), 4096 * 3])
def test_only_the_counted_pairs_are_copied(kernels: KernelLibrary, layout: str, width: int) -> None:
    blocks, runs = 40, 6
    if layout == "block-major":
        pool = torch.randn(blocks, runs, width, device="cuda").bfloat16()
    else:
        pool = torch.randn(runs, blocks, width, device="cuda").bfloat16().transpose(0, 1)
    expected = pool.clone()
    expected[7], expected[9] = pool[3], pool[3]
    copy_blocks(kernels, pool, pool, _int32(3, 7, 3, 9, 1, 2), _int32(2))
    assert torch.equal(pool, expected)


def test_swapping_out_and_in_gives_the_block_back_small(kernels: KernelLibrary) -> None:
    pool = torch.randn(10, 4, 512, device="cuda").bfloat16()
    host = torch.zeros(6, 4, 512, dtype=torch.bfloat16).pin_memory()
    before = pool.clone()
    copy_blocks(kernels, host, pool, _int32(3, 5, 8, 0), _int32(2))
    torch.cuda.synchronize()
    assert torch.equal(host[5], before[3].cpu())
    assert torch.equal(host[0], before[8].cpu())
    pool.zero_()
    copy_blocks(kernels, pool, host, _int32(5, 1), _int32(1))
    assert torch.equal(pool[1], before[3])
    assert not pool[2:].any()


def test_nothing_to_copy_changes_nothing_small(kernels: KernelLibrary) -> None:
    pool = torch.randn(10, 1, 512, device="cuda")
    before = pool.clone()
    copy_blocks(kernels, pool, pool, _int32(3, 5), _int32(0))
    assert torch.equal(pool, before)


def test_memory_that_the_gpu_cannot_reach_is_refused(kernels: KernelLibrary) -> None:
    pool = torch.zeros(10, 1, 512, device="cuda")
    with pytest.raises(KernelError, match="target is on cpu: it must be on the GPU or pinned"):
        copy_blocks(kernels, torch.zeros(10, 1, 512), pool, _int32(3, 5), _int32(1))
    with pytest.raises(KernelError, match=r"source is torch\.float32"):
        copy_blocks(kernels, pool, pool[:, :, :256], _int32(3, 5), _int32(1))
