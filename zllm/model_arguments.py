"""Which models to serve: `[NAME=]PATH[,setting=value…]`, given once or repeatedly.

A setting is a field of EngineConfig and goes before the same flag, for this model alone. PATH is a
folder or a hub id; left out, the name is the folder's own or the hub id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zllm.errors import ConfigError
from zllm.flags import build, flags_of
from zllm.runtime.config import EngineConfig
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.runtime.hub import resolve_model
from zllm.service.memory_shares import share_out
from zllm.service.model_folders import MODEL_NAME

EMBEDDED_NAME = "tiny"
_SERVER_WIDE = {"gpu_memory_utilization": "memory_share", "served_model_name": "NAME=PATH"}


@dataclass(frozen=True)
class ModelArgument:
    """One model as it was named."""

    name: str
    path: str
    """A folder or a hub id."""
    settings: Mapping[str, Any]


def engine_configs(models: Sequence[str], settings: Mapping[str, Any]) -> list[EngineConfig]:
    """What each engine is told; without any model, the embedded one's. Downloads hub ids that are
    not here yet. Raises ConfigError."""
    named = [parse_model(model) for model in models]
    alone = settings.get("served_model_name", "")
    if alone and len(named) > 1:
        raise ConfigError(
            "served_model_name names one model: with several, give each as --model NAME=PATH"
        )
    if not named:
        named = [ModelArgument(EMBEDDED_NAME, str(EMBEDDED_MODEL), {})]
    names = [alone or model.name for model in named]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two models are called {name!r}: name them with --model NAME=PATH")
    return share_out(
        [
            build(
                EngineConfig,
                {**settings, **model.settings},
                model=resolve_model(model.path),
                served_model_name=name,
            )
            for name, model in zip(names, named, strict=True)
        ]
    )


def parse_model(text: str) -> ModelArgument:
    """Raises ConfigError."""
    if Path(text).is_dir():
        return ModelArgument(Path(text).resolve().name, text, {})
    where, *parts = text.split(",")
    name, equals, path = where.partition("=")
    if not equals:
        name, path = "", where
    elif not MODEL_NAME.fullmatch(name):
        raise ConfigError(f"--model {text}: {name!r} is no name of letters, digits or . _ - / :")
    if not path:
        raise ConfigError(f"--model {text}: no path; give a folder or a hub id, as in NAME=PATH")
    if not name:
        name = Path(path).resolve().name if Path(path).exists() else path
    return ModelArgument(name, path, dict(_setting(part, text) for part in parts))


def _setting(part: str, text: str) -> tuple[str, Any]:
    flags = {flag.name: flag for flag in flags_of(EngineConfig)}
    key, _, value = part.partition("=")
    name = key.strip().replace("-", "_")
    if name in _SERVER_WIDE:
        raise ConfigError(f"--model {text}: {name} is the server's; use {_SERVER_WIDE[name]} here")
    if name not in flags:
        raise ConfigError(f"--model {text}: {key!r} is no setting of a model")
    return name, flags[name].read(value, f"--model {text}: {name}")
