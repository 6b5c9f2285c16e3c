"""A step's arena expanded on the device, against plain numpy."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from zllm.cuda.batch import Arenas, BatchExpander, BatchTables, BatchTensors, allocate
from zllm.cuda.launcher import KernelLibrary
from zllm.errors import KernelError
from zllm.native import arena as layout

pytestmark = pytest.mark.gpu
Array = npt.NDArray[np.int32]


def _pack(sections: dict[str, Array], step: dict[str, int]) -> Array:
    """Sections by name (ROWS, Q_START, …), in the order that the arena states."""
    header = np.zeros(layout.HEADER_WORDS, np.int32)
    words = [header]
    at = layout.HEADER_WORDS
    for name, section in sections.items():
        header[getattr(layout, f"H_{name}")] = at
        words.append(section.ravel().astype(np.int32))
        at += section.size
    for name, value in step.items():
        header[getattr(layout, f"H_{name}")] = value
    header[layout.H_NUM_WORDS] = at
    return np.concatenate(words)


class _Step:
    """A random step: its arena, and what the device should make of it."""

    def __init__(
        self,
        rng: np.random.Generator,
        tables: dict[str, Array],
        lengths: list[int],
        most_updates: int = 900,
    ) -> None:
        max_rows, max_blocks = tables["block_table"].shape
        rows = rng.permutation(max_rows - 1)[: len(lengths)]
        q_start = np.concatenate([[0], np.cumsum(lengths)])
        total = int(q_start[-1])
        kv_len = np.array([rng.integers(0, max_blocks * 16 - n + 1) for n in lengths])
        flags = np.where(rng.random(len(rows)) < 0.7, layout.F_SAMPLE, 0)
        on_device = (np.array(lengths) == 1) & (rng.random(len(rows)) < 0.5)
        flags |= np.where(on_device, layout.F_TOKEN_ON_DEVICE, 0)
        tokens = rng.integers(1, 1000, total)
        entries = rng.permutation((max_rows - 1) * max_blocks)[: rng.integers(0, most_updates)]
        blocks = rng.integers(1, 5000, len(entries))
        updates = np.stack([entries // max_blocks, entries % max_blocks, blocks], axis=1)
        new_rows = rng.permutation(max_rows - 1)[: rng.integers(0, min(max_rows, most_updates))]
        params = rng.integers(-(2**31), 2**31, (len(new_rows), layout.PARAM_WORDS))
        params[:, layout.P_ROW] = new_rows
        self.arena = _pack(
            {
                "ROWS": rows,
                "Q_START": q_start,
                "KV_LEN": kv_len,
                "FLAGS": flags,
                "TOKENS": tokens,
                "TABLE_UPDATES": updates,
                "PARAM_UPDATES": params,
            },
            {
                "NUM_ROWS": len(rows),
                "NUM_TOKENS": total,
                "NUM_TABLE_UPDATES": len(updates),
                "NUM_PARAM_UPDATES": len(params),
            },
        )
        self.tables = {name: table.copy() for name, table in tables.items()}
        self.tables["block_table"][updates[:, 0], updates[:, 1]] = updates[:, 2]
        self.tables["params"][new_rows] = params
        row_of = np.repeat(np.arange(len(rows)), lengths)
        positions = kv_len[row_of] + np.arange(total) - q_start[row_of]
        block = self.tables["block_table"][rows[row_of], positions // 16]
        sampled = np.flatnonzero(flags & layout.F_SAMPLE)
        last = tables["last_token"][rows[row_of]]
        self.expected: dict[str, tuple[Array, Any]] = {
            "tokens": (np.where(on_device[row_of], last, tokens), 0),
            "positions": (positions, 0),
            "slots": (block * 16 + positions % 16, 0),
            "rows": (rows, max_rows - 1),
            "q_start": (q_start, total),
            "kv_len": (kv_len, 0),
            "sample_tokens": (q_start[sampled + 1] - 1, 0),
            "sample_rows": (rows[sampled], max_rows - 1),
            "sample_positions": (positions[q_start[sampled + 1] - 1], 0),
            "sample_slots": ((block * 16 + positions % 16)[q_start[sampled + 1] - 1], 0),
        }


@pytest.mark.parametrize(
    ("lengths", "padded_tokens", "padded_rows", "most_updates"),
    [
        pytest.param([1, 1, 1, 40], 64, 8, 900, id="small"),
        # Little enough for all of it to be asked for at once.
        pytest.param([1, 1, 1, 40], 64, 8, 2, id="small-few-updates"),
        ([1] * 256, 256, 256, 20),
        ([1] * 256, 256, 256, 900),
        ([1] * 255 + [1793], 2048, 256, 900),
        ([700, 1, 3], 1024, 3, 900),
        ([1] * 1500, 1504, 1600, 900),
    ],
)
def test_arena_becomes_the_padded_batch(
    kernels: KernelLibrary,
    lengths: list[int],
    padded_tokens: int,
    padded_rows: int,
    most_updates: int,
) -> None:
    rng = np.random.default_rng(len(lengths))
    max_rows, max_blocks = max(len(lengths), 300) + 1, 128
    tables = {
        "block_table": rng.integers(1, 5000, (max_rows, max_blocks)).astype(np.int32),
        "params": np.zeros((max_rows, layout.PARAM_WORDS), np.int32),
        "last_token": rng.integers(1000, 2000, max_rows).astype(np.int32),
    }
    device = BatchTables(**{name: torch.from_numpy(t.copy()).cuda() for name, t in tables.items()})
    batch = allocate(padded_tokens, padded_rows, padded_rows, kernels.device)
    arenas = Arenas.allocate(100_000, kernels.device)
    expand = BatchExpander(kernels, layout.MACROS)
    expand(arenas, device, batch)  # an empty step, which also warms up what capture forbids
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        expand(arenas, device, batch, places=True)
    arenas.own[layout.H_STEP] = 2**31 - 2  # the number after the next begins anew
    numbers = [2**31 - 1, 0, 1]
    for number, pinned in zip(numbers, (*arenas.pinned, arenas.pinned[0]), strict=True):
        # Nothing may be left of the step before, in its own arena or in this one's place.
        step = _Step(rng, tables, lengths, most_updates)
        step.arena[layout.H_STEP] = number
        pinned[: len(step.arena)] = torch.from_numpy(step.arena)
        _replay(graph, batch, device, step)
        tables = step.tables
    # Nobody has packed the step after it: the same one again.
    _replay(graph, batch, device, step)
    assert arenas.own[layout.H_STEP] == numbers[-1]


def _replay(
    graph: torch.cuda.CUDAGraph, batch: BatchTensors, device: BatchTables, step: _Step
) -> None:
    for field in fields(batch):
        getattr(batch, field.name).fill_(-7)
    graph.replay()
    for name, (expected, padding) in step.expected.items():
        got = getattr(batch, name).cpu().numpy()
        assert np.array_equal(got[: len(expected)], expected), name
        assert np.all(got[len(expected) :] == padding), f"{name}: padding"
    for name in ("block_table", "params"):
        assert np.array_equal(getattr(device, name).cpu().numpy(), step.tables[name]), name


def test_places_of_samples_are_left_alone_where_nobody_asks(kernels: KernelLibrary) -> None:
    batch = allocate(16, 4, 4, kernels.device)
    for field in fields(batch):
        getattr(batch, field.name).fill_(-7)
    tables = BatchTables(
        *(torch.zeros(5, n, dtype=torch.int32, device="cuda") for n in (8, layout.PARAM_WORDS)),
        torch.zeros(5, dtype=torch.int32, device="cuda"),
    )
    BatchExpander(kernels, layout.MACROS)(Arenas.allocate(100, kernels.device), tables, batch)
    assert not (batch.sample_tokens == -7).any()
    assert (batch.sample_positions == -7).all()
    assert (batch.sample_slots == -7).all()


def test_a_tensor_of_another_size_is_named(kernels: KernelLibrary) -> None:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.int32, device="cuda")

    expand = BatchExpander(kernels, layout.MACROS)
    batch = allocate(16, 4, 4, kernels.device)
    tables = BatchTables(zeros(5, 8), zeros(5, 3), zeros(5))
    with pytest.raises(KernelError, match=r"params has shape \[5, 3\]"):
        expand(Arenas.allocate(100, kernels.device), tables, batch)
