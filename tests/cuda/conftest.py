"""One library of kernels for all tests of them.

What is named small is quick enough to run under compute-sanitizer (cuda-bindings asks the driver
for functions that an older one lacks, hence the second option):

    compute-sanitizer --tool racecheck --report-api-errors no \\
        python -m pytest tests/cuda -m gpu -k small
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from zllm.cuda.launcher import KernelLibrary, check_status


@pytest.fixture(scope="session")
def kernels() -> KernelLibrary:
    return KernelLibrary()


_DIRTY_BYTES = [1 << 19] * 32 + [1 << 26]
"""What torch's allocator is left with: its small tensors and its large ones are kept apart."""


@pytest.fixture(autouse=True)
def _dirty_memory(request: pytest.FixtureRequest) -> None:
    """Memory that nobody has written is NaN, and -1: a new process finds zeros by chance."""
    if request.node.get_closest_marker("gpu") is None or not torch.cuda.is_available():
        return
    from cuda.bindings import driver

    for tensor in [torch.empty(n, dtype=torch.uint8, device="cuda") for n in _DIRTY_BYTES]:
        # Not a kernel, which racecheck would follow through every byte.
        (status,) = driver.cuMemsetD8(tensor.data_ptr(), 0xFF, tensor.numel())
        check_status(status, "memory was not made dirty")


@pytest.fixture(autouse=True)
def _no_losses(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """NVRTC tells, of what compiles all the same, where products of wgmma had to be serialized."""
    caplog.set_level(logging.WARNING, "zllm.cuda.compiler")
    yield
    said = [record.getMessage() for record in caplog.get_records("call")]
    assert not [message for message in said if "Performance Loss" in message]
