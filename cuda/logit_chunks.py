"""What is left of logits for whoever samples (include/chunk.cuh)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zllm.cuda.checks import INT, require
from zllm.errors import KernelError

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

    def arguments(self, samples: int, vocab: int, device: int) -> tuple[Any, ...]:
        """What linear_wgmma.cu takes of it, for logits [S, V]; raises KernelError if they do not
        fit."""
        require("chunks", self.chunks, (torch.float32,), (samples, None, 2), device)
        require("sample_rows", self.sample_rows, INT, (samples,), device)
        require("params", self.params, INT, (None, None), device)
        pitch, words = self.chunks.shape[1], self.params.shape[1]
        if pitch * CHUNK < vocab:
            raise KernelError(f"chunks has {pitch} for each row: {vocab} logits are more")
        temperatures = self.params.view(-1)[self.temperature :]
        return self.chunks, self.sample_rows, temperatures, words, pitch
