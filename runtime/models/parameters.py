"""What a model says of its weights: names, shapes and where in a checkpoint they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Weights = dict[str, Tensor]
"""By the parameter's name, contiguous, on the model's device and of its dtype."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of a model."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[tuple[str, int], ...]
    """Tensors of the checkpoint and their rows, stacked along the first dimension in this order."""
    init: Literal["normal", "ones"] = "normal"
    """How dummy weights are drawn."""
    copy: str | None = None
    """A tensor of the checkpoint that holds the same once more, where it is there at all."""


def linear(
    name: str, columns: int, *sources: tuple[str, int], copy: str | None = None
) -> Parameter:
    """A [rows, columns] matrix of the `sources` (checkpoint name, rows)."""
    return Parameter(name, (sum(rows for _, rows in sources), columns), sources, copy=copy)


def bias(name: str, *sources: tuple[str, int]) -> Parameter:
    """A vector of the `sources` (checkpoint name, length)."""
    return Parameter(name, (sum(rows for _, rows in sources),), sources)


def norm(name: str, size: int, source: str) -> Parameter:
    """The gains of an RMSNorm."""
    return Parameter(name, (size,), ((source, size),), init="ones")
