"""What every test may count on: GPU tests skip without a GPU, slow ones unless asked for."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _signals_stay_as_they_were() -> Iterator[None]:
    """`zllm serve`, called here, ends its process at SIGTERM and SIGHUP: this one, for good."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="no NVIDIA GPU")
    not_asked = pytest.mark.skip(reason="set ZLLM_SLOW=1 to run the full sweep")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "slow" in item.keywords and os.environ.get("ZLLM_SLOW") != "1":
            item.add_marker(not_asked)
