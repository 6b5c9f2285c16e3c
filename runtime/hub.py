"""Where a model's files are: a folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from zllm.errors import ModelLoadError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]


def resolve_model(model: Path | str) -> Path:
    """The local folder of `model`, a path or a hub id such as `Qwen/Qwen3-0.6B`.

    A repository is downloaded, with a progress bar, unless the hub's cache holds it already;
    `HF_HUB_OFFLINE=1` never touches the network. Raises ModelLoadError.
    """
    try:
        folder = Path(model).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError) as error:  # no permission, too long, no such user's home
        raise ModelLoadError(
            f"the model {str(model)!r} cannot be looked at: {error}; the server's user must be "
            "able to enter the folders above it"
        ) from error
    if is_folder:
        return folder
    if exists:
        raise ModelLoadError(f"the model {model} is a file: give the folder that holds it")
    name = str(model)
    if not _REPOSITORY.fullmatch(name):
        raise ModelLoadError(
            f"the model {name!r} is neither a folder nor a hub id of the form owner/name"
        )
    return _download(name)


def _download(repository: str) -> Path:
    # Imported here: a local folder needs none of it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, allow_patterns=_PATTERNS))
    except GatedRepoError as error:
        raise ModelLoadError(
            f"the hub's model {repository!r} is gated: accept its terms there, then set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"no folder {repository!r} exists here, and the hub has no such model (or it is "
            f"private: set HF_TOKEN)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelLoadError(
            f"no folder {repository!r} exists here, it is not in the hub's cache, and the hub "
            f"cannot be reached (HF_HUB_OFFLINE set, or no network): download it first"
        ) from error
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise ModelLoadError(f"downloading {repository!r} failed: {error}") from error
