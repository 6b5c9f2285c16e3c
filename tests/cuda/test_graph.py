"""A captured graph, launched again and again."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu


def _captured(x: torch.Tensor) -> torch.cuda.CUDAGraph:
    """A graph that adds one to x."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
    return graph


@pytest.mark.parametrize("shown", [True, False], ids=["", "by a torch that hides its instance"])
def test_each_launch_runs_it_once_in_stream_order(
    shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zllm.cuda.graph import GraphLaunch

    if not shown:
        monkeypatch.setattr(torch.cuda.CUDAGraph, "raw_cuda_graph_exec", None, raising=False)
    x = torch.zeros(4, device="cuda")
    launch = GraphLaunch(_captured(x), torch.cuda.current_device())
    for value in (0.0, 10.0):
        torch.cuda._sleep(1_000_000)  # the launch must wait for what the stream does before it
        x.fill_(value)
        launch()
        launch()
        assert x.tolist() == [value + 2] * 4


def test_the_graph_lives_as_long_as_its_launch() -> None:
    from zllm.cuda.graph import GraphLaunch

    x = torch.zeros(1, device="cuda")
    launch = GraphLaunch(_captured(x), torch.cuda.current_device())
    _captured(torch.zeros(1, device="cuda"))  # another's memory, if the first were gone
    launch()
    assert x.item() == 1
