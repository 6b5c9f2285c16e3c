"""All layers of a decoder in one launch, for decode steps of a few tokens (kernels/decoder.cu).

With one sequence the kernels of 28 layers are 168, and they mostly wait for each other. This grid
goes on reading weights instead (docs/decisions/070-one-resident-grid.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from zllm.cuda.checks import INT, require
from zllm.cuda.compiler import Program
from zllm.cuda.decoder_plan import ROWS, DecoderPlan, DecoderShape, grid_of
from zllm.cuda.launcher import Int64, KernelLibrary
from zllm.cuda.rope_cache import BLOCK_TOKENS
from zllm.errors import KernelError

MAX_ROWS = ROWS[-1]
_SOURCE = "decoder.cu"
_DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class ResidentLayer:
    """What the kernel reads of a layer, all bfloat16: norms [H] and [D], weights [N, K], and the
    layer's view of the cache, [blocks, Hkv, 16, D]."""

    input_norm: Tensor
    qkv: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor
    keys: Tensor
    values: Tensor

    def pointers(self) -> list[int]:
        """struct Layer of decoder_shared.cuh."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def supports(
    library: KernelLibrary, shape: DecoderShape, dtype: torch.dtype, kv_dtype: torch.dtype
) -> bool:
    """Whether the kernel takes such a model on the library's device."""
    return (
        library.hopper
        and dtype == kv_dtype == _DTYPE
        and shape.regular
        and all(plan.fits for plan in _plans(library, shape))
    )


def programs(library: KernelLibrary, shape: DecoderShape) -> Iterator[Program]:
    """The programs of a model that is supported, for the steps where they are faster."""
    for plan in _plans(library, shape):
        if plan.rows <= shape.most_rows:
            yield Program(_SOURCE, plan.macros())


def _plans(library: KernelLibrary, shape: DecoderShape) -> list[DecoderPlan]:
    limit = library.device_attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
    grid = grid_of(shape, library.num_sms)
    return [DecoderPlan(shape, rows, grid, limit) for rows in ROWS]


class ResidentDecoder:
    """The layers of one model on one device. Its launches share a mailbox: one stream's only."""

    def __init__(
        self,
        library: KernelLibrary,
        shape: DecoderShape,
        embedding: Tensor,
        layers: Sequence[ResidentLayer],
        cos_sin: Tensor,
        *,
        eps: float,
    ) -> None:
        """embedding: [V, H]; cos_sin: float32 [positions, D], D/2 cosines then D/2 sines; eps: of
        every norm."""
        self._library = library
        self._shape = shape
        self.most_rows = shape.most_rows
        """Tokens of a step up to which this is faster than one kernel after the other."""
        self._plans = _plans(library, shape)
        _check_model(shape, embedding, layers, cos_sin, library.device)
        self._embedding, self._layers, self._cos_sin = embedding, tuple(layers), cos_sin
        self._eps = eps
        device = torch.device("cuda", library.device)
        pointers = [layer.pointers() for layer in layers]
        self._table = torch.tensor(pointers, dtype=torch.int64, device=device)
        words = max(plan.mailbox_words for plan in self._plans)
        self._mailbox = torch.zeros(words, dtype=torch.int64, device=device)
        self._epoch = torch.zeros(1, dtype=torch.int32, device=device)

    def run(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        rows: Tensor,
        q_start: Tensor,
        kv_len: Tensor,
        block_table: Tensor,
        *,
        scale: float,
        out: Tensor | None = None,
    ) -> Tensor:
        """[P] tokens, P up to MAX_ROWS -> [P, H], the residual after the last layer; their keys and
        values are written to `slots`. The other tensors are int32 as runtime.ops.Batch has them, R
        being P and no row having more than one token; block_table: [rows, max_blocks]; scale: of
        the scores before the softmax. A token outside the vocabulary counts as zeros, rows of
        padding are undefined.
        """
        device, count = self._library.device, tokens.numel()
        for name, tensor, size in (
            ("tokens", tokens, None),
            ("positions", positions, count),
            ("slots", slots, count),
            ("rows", rows, count),
            ("q_start", q_start, count + 1),
            ("kv_len", kv_len, count),
        ):
            require(name, tensor, INT, (size,), device)
        require("block_table", block_table, INT, (None, None), device)
        if not 1 <= count <= MAX_ROWS:
            raise KernelError(f"tokens: {count} of them, takes 1 to {MAX_ROWS}")
        shape = (count, self._shape.hidden_size)
        if out is None:
            out = self._embedding.new_empty(shape)
        require("out", out, (_DTYPE,), shape, device)
        plan = next(plan for plan in self._plans if plan.rows >= count)
        keys = self._layers[0].keys
        self._library.get(_SOURCE, "decoder", plan.macros()).launch(
            (plan.grid, 1, 1),
            (plan.threads, 1, 1),
            (
                out,
                self._embedding,
                tokens,
                positions,
                slots,
                rows,
                q_start,
                kv_len,
                block_table,
                self._cos_sin,
                self._table,
                self._mailbox,
                self._epoch,
                Int64(keys.stride(0)),
                count,
                self._embedding.shape[0],
                block_table.stride(0),
                scale,
                self._eps,
            ),
            shared_bytes=plan.shared_bytes,
            cooperative=True,
        )
        return out


def _check_model(
    shape: DecoderShape,
    embedding: Tensor,
    layers: Sequence[ResidentLayer],
    cos_sin: Tensor,
    device: int,
) -> None:
    hidden, inner, dim = shape.hidden_size, shape.intermediate_size, shape.head_dim
    require("embedding", embedding, (_DTYPE,), (None, hidden), device)
    require("cos_sin", cos_sin, (torch.float32,), (None, dim), device)
    if len(layers) != shape.num_layers:
        raise KernelError(f"layers: {len(layers)} of them, the shape says {shape.num_layers}")
    stride = layers[0].keys.stride()
    for index, layer in enumerate(layers):
        name = f"layers[{index}]"
        for field, tensor, size in (
            ("input_norm", layer.input_norm, (hidden,)),
            ("qkv", layer.qkv, (shape.qkv_width, hidden)),
            ("output", layer.output, (hidden, shape.attended)),
            ("post_norm", layer.post_norm, (hidden,)),
            ("gate_up", layer.gate_up, (2 * inner, hidden)),
            ("down", layer.down, (hidden, inner)),
        ):
            require(f"{name}.{field}", tensor, (_DTYPE,), size, device)
        for field, gains in (("q_norm", layer.q_norm), ("k_norm", layer.k_norm)):
            if (gains is not None) != shape.qk_norm:
                raise KernelError(f"{name}.{field}: the shape says qk_norm={shape.qk_norm}")
            if gains is not None:
                require(f"{name}.{field}", gains, (_DTYPE,), (dim,), device)
        for field, cache in (("keys", layer.keys), ("values", layer.values)):
            tail = (shape.num_kv_heads, BLOCK_TOKENS, dim)
            require(f"{name}.{field}[0]", cache[0], (_DTYPE,), tail, device)
            if cache.stride() != stride or stride[0] * cache.itemsize % 16:
                raise KernelError(
                    f"{name}.{field}: blocks lie {cache.stride(0)} elements apart: they must lie "
                    f"{stride[0]} apart as in the first layer, a multiple of 16 bytes"
                )
