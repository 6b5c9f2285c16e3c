"""One library of kernels for all tests of them.

What is named small is quick enough to run under compute-sanitizer (cuda-bindings asks the driver
for functions that an older one lacks, hence the second option):

    compute-sanitizer --tool racecheck --report-api-errors no \\
        python -m pytest tests/cuda -m gpu -k small
"""

from __future__ import annotations

import pytest

from zllm.cuda.launcher import KernelLibrary


@pytest.fixture(scope="session")
def kernels() -> KernelLibrary:
    return KernelLibrary()
