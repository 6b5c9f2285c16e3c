"""An engine takes its share of the memory, whatever other engines of the server hold by then."""

from __future__ import annotations

import pytest
import torch

from zllm.errors import ConfigError
from zllm.runtime import torch_runner
from zllm.runtime.config import EngineConfig
from zllm.runtime.cuda_memory import MemoryPlan, plan_memory
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.runtime.torch_runner import TorchRunner

GIB = 1024**3


def plan(
    monkeypatch: pytest.MonkeyPatch, *, share: float, before: float, now: float | None = None
) -> MemoryPlan:
    """On a GPU of 100 GiB of which 90 may be used, with weights of 10 GiB; `before` and `now`
    are what torch does not hold, in GiB."""
    taken = before if now is None else now
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda _: (int((100 - taken - 10) * GIB), 100 * GIB)
    )
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10 * GIB)
    return plan_memory(
        torch.device("cuda"),
        taken_before=int(before * GIB),
        share=share,
        weights=10 * GIB,
        step_peak=GIB // 8,  # twice that, and the reserve of graphs, make 1 GiB
        block_bytes=GIB,
        utilization=0.9,
        wanted_blocks=None,
        request_blocks=1,
        shrink=False,
    )


def test_alone_an_engine_takes_what_the_utilization_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert plan(monkeypatch, share=1.0, before=1).num_blocks == 90 - 1 - 10 - 1 - 1
    assert plan(monkeypatch, share=1.0, before=1, now=3).num_blocks == 90 - 3 - 10 - 1 - 1


def test_a_share_is_the_same_before_and_after_the_others_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = plan(monkeypatch, share=0.5, before=1).num_blocks
    replaced = plan(monkeypatch, share=0.5, before=1 + 44).num_blocks
    assert first == replaced == 45 - 10 - 1 - 1


def test_what_others_left_bounds_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(monkeypatch, share=0.5, before=60).num_blocks == 90 - 60 - 10 - 1 - 1
    with pytest.raises(ConfigError, match="memory_share"):
        plan(monkeypatch, share=0.1, before=1)


def test_a_share_of_a_cpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_runner, "available_memory", lambda: 64 * 1024**2)

    def blocks(share: float | None) -> int:
        config = EngineConfig(model=EMBEDDED_MODEL, memory_share=share, max_num_seqs=4096)
        return TorchRunner(config).num_kv_blocks - 1

    assert blocks(None) == blocks(1.0)
    assert blocks(0.25) == blocks(1.0) // 4
