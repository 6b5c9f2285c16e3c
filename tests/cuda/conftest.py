"""One library of kernels for all tests of them."""

from __future__ import annotations

import pytest

from zllm.cuda.launcher import KernelLibrary


@pytest.fixture(scope="session")
def kernels() -> KernelLibrary:
    return KernelLibrary()
