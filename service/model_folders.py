"""Which folder LoadModel means, and what its model may be called."""

from __future__ import annotations

import os
import re
from pathlib import Path

from zllm.errors import ConfigError, InvalidRequest

MODEL_NAME = re.compile(r"[\w.:-][\w.:/-]{0,199}", re.ASCII)


def check_root(root: str) -> None:
    """Raises ConfigError for a --model-root within which there is nothing to load."""
    if root and not os.path.isdir(root):
        raise ConfigError(
            f"--model-root {root}: it is no folder here; name the one that holds the models, or "
            "leave it out"
        )


def find_folder(path: str, root: str) -> Path:
    """The model's folder, links resolved: a path from `root` and within it, or any absolute one
    where there is no root. Raises InvalidRequest."""
    if not path or "\0" in path:
        raise InvalidRequest("path", "give the model's folder on the server's machine")
    if not root:
        folder = Path(path)
        if not folder.is_absolute():
            raise InvalidRequest("path", f"{path[:200]!r} must be absolute")
    try:
        if root:
            top = Path(root).resolve()
            folder = (top / path).resolve()
            if not folder.is_relative_to(top):
                raise InvalidRequest("path", f"{path[:200]!r} is not within --model-root")
        is_folder = folder.is_dir()
    except (OSError, RuntimeError):  # a name that is too long, a circle of links
        is_folder = False
    if not is_folder:
        raise InvalidRequest("path", f"{path[:200]!r} is no folder here")
    return folder
