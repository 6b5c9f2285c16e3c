"""What is left of logits for whoever samples (include/chunk.cuh)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

CHUNK = 64
"""Logits of a chunk."""


@dataclass(frozen=True, slots=True)
class LogitChunks:
    """Where the product that makes logits [S, V] leaves each chunk's largest one and its weight at
    the row's temperature, so that no kernel has to read them for that."""

    chunks: Tensor
    """float32 [S, chunks of a row, padded, 2]."""
    sample_rows: Tensor
    """int32 [S] device row of each."""
    params: Tensor
    """int32 [rows, words]: the rows' sampling parameters."""
    temperature: int
    """The word that has the temperature's bits."""
