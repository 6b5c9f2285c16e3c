"""Which architectures are served: their names alone, so that config.json may be refused by its name
before its fields are read."""

from __future__ import annotations

from zllm.errors import ModelLoadError

SUPPORTED = ("Qwen3ForCausalLM",)


def require_supported(architecture: str) -> None:
    """Raises ModelLoadError where no class serves the architecture."""
    if architecture not in SUPPORTED:
        raise ModelLoadError(
            f"config.json: the architecture {architecture!r} is not supported; "
            f"supported are {', '.join(SUPPORTED)}"
        )
