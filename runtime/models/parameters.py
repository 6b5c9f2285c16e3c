"""What a model says of its weights: names, shapes and where in a checkpoint they come from."""

from __future__ import annotations

from collections.abc import Iterable
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
    norm: str | None = None
    """The gains of the RMSNorm behind which this matrix alone stands, a parameter of [columns]. All
    norms within the layers are named so, or none."""


def linear(
    name: str,
    columns: int,
    *sources: tuple[str, int],
    copy: str | None = None,
    norm: str | None = None,
) -> Parameter:
    """A [rows, columns] matrix of the `sources` (checkpoint name, rows)."""
    shape = (sum(rows for _, rows in sources), columns)
    return Parameter(name, shape, sources, copy=copy, norm=norm)


def bias(name: str, *sources: tuple[str, int]) -> Parameter:
    """A vector of the `sources` (checkpoint name, length)."""
    return Parameter(name, (sum(rows for _, rows in sources),), sources)


def norm(name: str, size: int, source: str) -> Parameter:
    """The gains of an RMSNorm."""
    return Parameter(name, (size,), ((source, size),), init="ones")


def fold_norms(weights: Weights, parameters: Iterable[Parameter]) -> int:
    """Multiply matrices, in place, by the gains of the norms before them, which become ones: what
    the model computes stays the same, up to a rounding of each weight. How many norms there were.
    """
    folded = [(p.name, p.norm) for p in parameters if p.norm is not None]
    for matrix, norm in folded:
        weights[matrix] *= weights[norm]
        weights[norm].fill_(1.0)
    return len(folded)
