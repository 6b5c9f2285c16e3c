"""Packs step arenas by hand, for tests that need no scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from zllm.native import arena as layout


@dataclass(frozen=True)
class Row:
    """One sequence in a step."""

    row: int
    tokens: list[int]
    kv_len: int = 0
    sample: bool = True
    on_device: bool = False


@dataclass(frozen=True)
class Params:
    """A row's sampling parameters."""

    row: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    seed: int = 0
    min_len: int = 0
    end_ids: tuple[int, ...] = ()

    def words(self) -> npt.NDArray[np.int32]:
        out = np.zeros(layout.PARAM_WORDS, np.int32)
        floats = out.view(np.float32)
        out[layout.P_ROW] = self.row
        floats[layout.P_TEMPERATURE] = self.temperature
        floats[layout.P_TOP_P] = self.top_p
        floats[layout.P_MIN_P] = self.min_p
        out[layout.P_TOP_K] = self.top_k
        seed = np.array([self.seed], np.uint64).view(np.int32)
        out[layout.P_SEED_LOW : layout.P_SEED_HIGH + 1] = seed
        floats[layout.P_REPETITION] = 1.0
        out[layout.P_MIN_LEN] = self.min_len
        out[layout.P_NUM_LOGPROBS] = -1
        out[layout.P_NUM_END_IDS] = len(self.end_ids)
        out[layout.P_END_IDS : layout.P_END_IDS + len(self.end_ids)] = self.end_ids
        return out

    @property
    def features(self) -> int:
        return (
            layout.S_RANDOM * (self.temperature > 0)
            | layout.S_TOP_K * (self.top_k > 0)
            | layout.S_TOP_P * (self.top_p < 1)
            | layout.S_MIN_P * (self.min_p > 0)
            | layout.S_MIN_TOKENS * (self.min_len > 0)
        )


@dataclass(frozen=True)
class Step:
    """What a step's arena says."""

    rows: list[Row]
    table: list[tuple[int, int, int]] = field(default_factory=list)
    params: list[Params] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    max_logprobs: int = -1

    def pack(self) -> npt.NDArray[np.int32]:
        """The arena, exactly as long as it must be. Decodes have to stand first."""
        lengths = [len(row.tokens) for row in self.rows]
        sections = {
            layout.H_ROWS: [row.row for row in self.rows],
            layout.H_Q_START: np.concatenate([[0], np.cumsum(lengths)]),
            layout.H_KV_LEN: [row.kv_len for row in self.rows],
            layout.H_FLAGS: [
                layout.F_SAMPLE * row.sample | layout.F_TOKEN_ON_DEVICE * row.on_device
                for row in self.rows
            ],
            layout.H_TOKENS: [token for row in self.rows for token in row.tokens],
            layout.H_TABLE_UPDATES: self.table,
            layout.H_PARAM_UPDATES: [params.words() for params in self.params],
            layout.H_COPIES: self.copies,
            layout.H_SWAP_OUT: self.swap_out,
            layout.H_SWAP_IN: self.swap_in,
        }
        header = np.zeros(layout.HEADER_WORDS, np.int32)
        words = [header]
        offset = layout.HEADER_WORDS
        for name, values in sections.items():
            flat = np.asarray(values, np.int32).reshape(-1)
            header[name] = offset
            offset += len(flat)
            words.append(flat)
        header[layout.H_NUM_ROWS] = len(self.rows)
        header[layout.H_NUM_TOKENS] = sum(lengths)
        header[layout.H_NUM_DECODES] = sum(
            row.kv_len > 0 and len(row.tokens) == 1 for row in self.rows
        )
        header[layout.H_NUM_TABLE_UPDATES] = len(self.table)
        header[layout.H_NUM_PARAM_UPDATES] = len(self.params)
        header[layout.H_NUM_COPIES] = len(self.copies)
        header[layout.H_NUM_SWAP_OUT] = len(self.swap_out)
        header[layout.H_NUM_SWAP_IN] = len(self.swap_in)
        header[layout.H_NUM_WORDS] = offset
        header[layout.H_NUM_SAMPLED] = sum(row.sample for row in self.rows)
        header[layout.H_MAX_LOGPROBS] = self.max_logprobs
        for params in self.params:
            header[layout.H_FEATURES] |= params.features
        return np.concatenate(words)
