"""A step's tokens on their way to the host."""

from __future__ import annotations

import pytest
import torch

from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.publish import publish

STEP_WORD = 3


@pytest.mark.gpu
@pytest.mark.parametrize("count", [pytest.param(5, id="small"), 1, 1500])
def test_even_and_odd_steps_have_a_row_each(kernels: KernelLibrary, count: int) -> None:
    host = torch.full((2, 2000), -7, dtype=torch.int32, pin_memory=True)
    arena = torch.zeros(8, dtype=torch.int32, device="cuda")
    for step in (6, 7, 8):
        arena[STEP_WORD] = step
        tokens = torch.randint(150_000, (count,), dtype=torch.int32, device="cuda")
        publish(kernels, host, tokens, arena, STEP_WORD)
        torch.cuda.synchronize()
        assert torch.equal(host[step % 2, :count], tokens.cpu())
        assert torch.all(host[:, count:] == -7)
