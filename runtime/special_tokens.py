"""Special tokens that the files beside tokenizer.json name, by transformers' rules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zllm.runtime.json_files import read_object

_GROUPS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    named: dict[str, str]
    """By the name that a template knows them by, such as `bos_token`."""
    contents: frozenset[str]
    """Of all of them, those without a name too."""


def load_special_tokens(folder: Path) -> SpecialTokens:
    """What tokenizer_config.json and special_tokens_map.json of a model folder name.

    A config with an `added_tokens_decoder` stands alone; over any other the map, which is older,
    has the last word of what has a name, and a list where the config has none. Raises
    ModelLoadError.
    """
    config = read_object(folder / "tokenizer_config.json") or {}
    files = [config]
    if "added_tokens_decoder" not in config:
        files.append(read_object(folder / "special_tokens_map.json") or {})
    named: dict[str, Any] = {}
    nameless: list[Any] = []
    for file in files:
        listed: list[Any] = []
        for key, value in file.items():
            if key.endswith("_token"):
                named[key] = value
            elif key in _GROUPS and isinstance(value, dict):
                named |= value
            elif key in _GROUPS and isinstance(value, list):
                listed += value
        nameless = nameless or listed
    described = config.get("added_tokens_decoder")
    if isinstance(described, dict):
        entries = [entry for entry in described.values() if isinstance(entry, dict)]
        nameless += [entry for entry in entries if entry.get("special") is True]
    contents = {name: _content(token) for name, token in named.items()}
    known = {name: content for name, content in contents.items() if content is not None}
    others = {content for token in nameless if (content := _content(token)) is not None}
    return SpecialTokens(known, frozenset(others | set(known.values())))


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
