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

from zllm.cuda.launcher import KernelLibrary


@pytest.fixture(scope="session")
def kernels() -> KernelLibrary:
    return KernelLibrary()


@pytest.fixture(autouse=True)
def _no_losses(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """NVRTC tells, of what compiles all the same, where products of wgmma had to be serialized."""
    caplog.set_level(logging.WARNING, "zllm.cuda.compiler")
    yield
    said = [record.getMessage() for record in caplog.get_records("call")]
    assert not [message for message in said if "Performance Loss" in message]
