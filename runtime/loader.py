"""Weights from safetensors files, straight to the device they are used on."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zllm.errors import ModelLoadError
from zllm.runtime.models.parameters import Parameter, Weights

_log = logging.getLogger(__name__)

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}


def load_weights(
    folder: Path,
    parameters: Iterable[Parameter],
    dtype: torch.dtype,
    device: torch.device,
) -> Weights:
    """Read every parameter from the folder's safetensors files, converted to `dtype`.

    Tensors that the model does not ask for are ignored, with a warning. Raises ModelLoadError where
    a file is missing, unreadable or corrupt, or a tensor is missing, there twice, of another shape,
    no floating-point tensor, or not the copy that it should be.
    """
    weights: Weights = {}
    wanted: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for parameter in parameters:
        weight = torch.empty(parameter.shape, dtype=dtype, device=device)
        weights[parameter.name] = weight
        parts = weight.split([rows for _, rows in parameter.sources])
        wanted.update(zip((name for name, _ in parameter.sources), parts, strict=True))
        if parameter.copy is not None:
            copies[parameter.copy] = weight
    console = Console(stderr=True)
    files = _files(folder)
    found: dict[str, Path] = {}
    unused: list[str] = []
    for path in track(
        files, "Loading weights", console=console, disable=not console.is_terminal, transient=True
    ):
        unused += _load_file(path, wanted, found)
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise ModelLoadError(
            f"{folder}: {len(missing)} tensors are missing from the safetensors files, among them "
            f"{', '.join(missing[:3])}: the checkpoint is incomplete, or config.json is another "
            "model's"
        )
    unused = sorted(set(unused) - copies.keys())
    if unused:
        _log.warning(
            "%s: %d tensors are not used, among them %s: where these are the model's own, such as "
            "biases or layers, config.json says too little and answers will be wrong",
            folder, len(unused), ", ".join(unused[:3]),
        )  # fmt: skip
    for path in files if copies else ():
        _check_copies(path, copies)
    return weights


def dummy_weights(
    parameters: Iterable[Parameter],
    dtype: torch.dtype,
    device: torch.device,
    *,
    std: float,
    seed: int,
) -> Weights:
    """Random weights made on the device: matrices normal with deviation `std`, norms all one."""
    generator = torch.Generator(device).manual_seed(seed)
    weights: Weights = {}
    for parameter in parameters:
        weight = torch.empty(parameter.shape, dtype=dtype, device=device)
        if parameter.init == "ones":
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, std, generator=generator)
        weights[parameter.name] = weight
    return weights


def weights_bytes(weights: Weights) -> int:
    """Memory that the weights take."""
    return sum(math.prod(weight.shape) * weight.dtype.itemsize for weight in weights.values())


def _files(folder: Path) -> list[Path]:
    """The folder's safetensors files: the one with the name for all weights, those of its index, or
    all of them."""
    whole, index = folder / _WHOLE, folder / _INDEX
    if whole.exists():
        return [whole]
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelLoadError(
                f"{folder} holds no *.safetensors file: only checkpoints in that format are loaded"
            )
        return files
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = sorted(folder / name for name in names)
    except (
        OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError,
    ) as error:  # fmt: skip
        raise ModelLoadError(f"{index} is corrupt: {error!r}; download the model again") from error
    for path in files:
        if path.parent != folder:
            raise ModelLoadError(f"{index} names {path}, which is outside of the model's folder")
        if not os.path.exists(path):  # Path.exists raises where a name is too long
            raise ModelLoadError(f"{path} is missing, though {index.name} names it")
    return files


def _load_file(path: Path, wanted: dict[str, Tensor], found: dict[str, Path]) -> list[str]:
    """Copy the file's wanted tensors to their places, and note where they were found. The others'
    names."""
    others: list[str] = []
    try:
        # safetensors calls every file that it cannot open a missing one.
        path.open("rb").close()
    except OSError as error:
        raise ModelLoadError(
            f"{path} cannot be read: {error}; let the server's user read it, or download the model "
            "again"
        ) from error
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                target = wanted.get(name)
                if target is None:
                    others.append(name)
                    continue
                if name in found:
                    raise ModelLoadError(
                        f"{path}: tensor {name} is in {found[name].name} too: take one of the two "
                        "away"
                    )
                view = file.get_slice(name)
                shape, kind = tuple(view.get_shape()), view.get_dtype()
                if kind not in _FLOATS:
                    raise ModelLoadError(
                        f"{path}: tensor {name} is of type {kind}: quantized checkpoints are not "
                        f"supported"
                    )
                if shape != tuple(target.shape):
                    raise ModelLoadError(
                        f"{path}: tensor {name} has shape {list(shape)}, but config.json asks for "
                        f"{list(target.shape)}"
                    )
                target.copy_(file.get_tensor(name))
                found[name] = path
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelLoadError(f"{path} is corrupt: {error}; download the model again") from error
    return others


def _check_copies(path: Path, copies: dict[str, Tensor]) -> None:
    """What config.json calls one tensor, and the file has twice, must be the same."""
    with safe_open(path, framework="pt") as file:
        for name in copies.keys() & set(file.keys()):
            weight = copies[name]
            stored = file.get_tensor(name).to(weight.device, weight.dtype)
            if not torch.equal(stored, weight):
                raise ModelLoadError(
                    f"{path}: tensor {name} is not the embedding, though config.json says "
                    "tie_word_embeddings: set that to false, or take the tensor out"
                )
