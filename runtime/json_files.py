"""The JSON files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zllm.errors import ModelLoadError


def read_object(path: Path) -> dict[str, Any] | None:
    """The object that the file holds; None where there is no file. Raises ModelLoadError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(read, dict):
        raise ModelLoadError(f"{path} holds no JSON object")
    return read
