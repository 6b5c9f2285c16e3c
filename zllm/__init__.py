"""zllm: an LLM inference server. The face: `from zllm import LLM, SamplingParams, Client`.

Each name loads when it is first asked for, so that a client never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zllm.clients.aio import AsyncClient
    from zllm.clients.client import Client
    from zllm.runtime.llm import LLM
    from zllm.runtime.sampling_params import SamplingParams

__all__ = ["LLM", "AsyncClient", "Client", "SamplingParams", "__version__"]

_HOMES = {
    "AsyncClient": "zllm.clients.aio",
    "Client": "zllm.clients.client",
    "LLM": "zllm.runtime.llm",
    "SamplingParams": "zllm.runtime.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("zllm")
    if name not in _HOMES:
        raise AttributeError(f"module 'zllm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
