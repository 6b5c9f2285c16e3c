"""Where an engine cannot run, it says why and what to do."""

from __future__ import annotations

import pytest
import torch

from zllm.errors import ConfigError
from zllm.runtime.config import EngineConfig
from zllm.runtime.cuda_graphs import bucket_of, choose_buckets
from zllm.runtime.cuda_memory import plan_memory
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.runtime.model_runner import make_runner

GIB = 1024**3


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"no GPU.*zllm doctor"):
        make_runner(EngineConfig(model=EMBEDDED_MODEL, device="cuda"))


@pytest.fixture
def _card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 16 GiB of which 15 are free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (15 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)


def plan(**changes: object) -> object:
    settings = {
        "taken_before": GIB,
        "share": 1.0,
        "weights": 8 * GIB,
        "step_peak": GIB // 8,
        "block_bytes": GIB // 1024,
        "utilization": 0.9,
        "wanted_blocks": None,
        "request_blocks": 1024,
        "shrink": False,
    }
    return plan_memory(torch.device("cuda"), **{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.usefixtures("_card")
def test_the_cache_gets_what_weights_a_step_and_others_leave() -> None:
    found = plan()
    # 90% of 16 GiB, less 1 GiB of others, 8 of weights, 1 for a step and graphs, and block 0.
    assert found.num_blocks == int(0.9 * 16 * 1024) - 10 * 1024 - 1  # type: ignore[attr-defined]
    assert any("KV cache" in line for line in found.lines())  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_card")
def test_an_engine_with_a_share_takes_no_more_whatever_the_others_have() -> None:
    alone = plan(weights=2 * GIB, share=0.5)
    beside = plan(weights=2 * GIB, share=0.5, taken_before=0)
    # Half of the 90%, less 2 GiB of weights and 1 for a step; what came before it is not its own.
    assert alone.num_blocks == int(0.45 * 16 * 1024) - 3 * 1024 - 1  # type: ignore[attr-defined]
    assert beside.num_blocks == alone.num_blocks - 1024  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_card")
@pytest.mark.parametrize(
    "changes",
    [
        {"weights": 14 * GIB},
        {"request_blocks": 100_000},
        {"wanted_blocks": 100_000},
        {"utilization": 0.5},
        {"share": 0.5},
    ],
)
def test_too_small_a_gpu_is_refused_with_the_numbers(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"16\.0 GiB.*Lower max_model_len"):
        plan(**changes)


@pytest.mark.usefixtures("_card")
def test_a_length_that_nobody_asked_for_may_shrink_to_what_fits() -> None:
    assert plan(request_blocks=100_000, shrink=True).num_blocks > 1000  # type: ignore[attr-defined]


@pytest.mark.parametrize("most", [1, 5, 64, 200, 256, 300, 1024])
def test_every_step_of_a_pure_decode_has_a_graph_that_pads_little(most: int) -> None:
    buckets = choose_buckets(most, 8192).decode
    assert list(buckets) == sorted(set(buckets))
    for size in range(1, most + 1):
        bucket = bucket_of(size, buckets)
        assert bucket is not None
        assert size <= bucket <= max(2 * size, size + 7, size * 1.25)
    assert bucket_of(most + 1, buckets) is None


def test_no_graph_is_larger_than_a_step() -> None:
    buckets = choose_buckets(256, 100)
    assert buckets.decode[-1] == 100
    assert all(size <= 100 for size in buckets.mixed)
