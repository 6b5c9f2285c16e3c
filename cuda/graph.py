"""The launch of a captured graph.

torch's replay takes twice as long of the host: it also moves on the state of a random number
generator that no kernel here draws from.
"""

from __future__ import annotations

import torch

from zllm.cuda.launcher import check_status


class GraphLaunch:
    """Launches `graph`, whose capture has ended, on torch's current stream of `device`."""

    def __init__(self, graph: torch.cuda.CUDAGraph, device: int) -> None:
        # Imported here, since this module is also read where there is no GPU.
        from cuda.bindings import driver

        self._graph = graph  # which owns what is launched
        self._device = device
        self._launch = driver.cuGraphLaunch
        # Newer ones than our oldest torch show their instance of a graph.
        instance = getattr(graph, "raw_cuda_graph_exec", None)
        self._instance = driver.CUgraphExec(int(instance())) if instance else None

    def __call__(self) -> None:
        if self._instance is None:
            self._graph.replay()
            return
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        (status,) = self._launch(self._instance, stream)
        if status:
            check_status(status, "a graph did not launch")
