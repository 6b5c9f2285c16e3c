"""The compute interface: the dozen fused operations that a decoder needs.

Models are written once against `Ops`. `TorchOps` (runtime/torch_ops.py) is the reference and the
CPU default; `CudaOps` (runtime/cuda_ops.py) launches our kernels. Letters in shapes: P tokens of
the step (padded on CUDA), R rows, S sampled rows, H hidden size, Hq and Hkv heads, D head size,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zllm.runtime.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's arena, expanded on the device. All tensors are int32."""

    tokens: Tensor
    """[P] token ids."""
    positions: Tensor
    """[P] position of each token in its sequence."""
    slots: Tensor
    """[P] where each token's KV goes: block * 16 + offset. Padding tokens go to block 0."""
    rows: Tensor
    """[R] device row of each sequence in the step; decodes stand first."""
    q_start: Tensor
    """[R + 1] first token of each row; padding rows are empty."""
    kv_len: Tensor
    """[R] tokens in the cache before this step."""
    sample_tokens: Tensor
    """[S] index into the tokens of each row's last token, for rows that sample."""
    sample_rows: Tensor
    """[S] device row of each sampled row."""
    block_table: Tensor
    """[max_num_seqs + 1, max_blocks] blocks by device row."""
    work: Any = None
    """What the backend's attention made of the batch, once for all layers."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the sampler gave for the S sampled rows."""

    tokens: Tensor
    """[S] int32; -1 where a row's logits were not finite."""
    logprobs: Tensor | None = None
    """[S] float32 natural log-probability of the token under the unmodified distribution."""
    ranks: Tensor | None = None
    """[S] int32; 1 is the most likely token."""
    top_ids: Tensor | None = None
    """[S, N] int32, best first."""
    top_logprobs: Tensor | None = None
    """[S, N] float32."""


@dataclass(frozen=True, slots=True)
class SamplingStep:
    """What the host knows of a step's sampling, so that only what is needed runs."""

    features: int
    """S_ bits of the arena."""
    max_logprobs: int
    """-1: nobody wants any; else N of Sampled.top_ids."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """The weights of one layer: attention, then a gated MLP, each behind an RMSNorm. All have the
    model's dtype; Hq and Hkv are its heads, D their size, H the hidden size and I the MLP's."""

    input_norm: Tensor
    """[H]."""
    qkv: Tensor
    """[(Hq + 2 Hkv) * D, H]."""
    qkv_bias: Tensor | None
    """[(Hq + 2 Hkv) * D]."""
    q_norm: Tensor | None
    """[D]; with k_norm, or neither."""
    k_norm: Tensor | None
    """[D]."""
    output: Tensor
    """[H, Hq * D]."""
    output_bias: Tensor | None
    """[H]."""
    post_norm: Tensor
    """[H]."""
    gate_up: Tensor
    """[2 I, H]: the gate's rows, then the up projection's."""
    down: Tensor
    """[H, I]."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """All layers of a model, for backends that can take them at once."""

    embedding: Tensor
    """[V, H]."""
    layers: tuple[DecoderLayer, ...]
    cos_sin: Tensor
    """float32 [max_model_len, D] (runtime/rope.py)."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    """Of the attention's scores."""
    eps: float
    """Of every norm."""


class Ops(Protocol):
    """What a backend must do. Inputs are checked where they enter a kernel."""

    device: torch.device

    def decode(self, decoder: Decoder, batch: Batch, cache: KVCache) -> Tensor | None:
        """[P] tokens -> [P, H]: all layers at once, keys and values written; None where the backend
        is not faster so than by one operation after the other."""
        ...

    def embed(self, table: Tensor, tokens: Tensor) -> Tensor:
        """[V, H], [P] -> [P, H]: the rows of the table."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[P, H], [H] -> [P, H]: x / sqrt(mean(x^2) + eps) * weight, in float32 inside.

        Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".
        """
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[P, in], [out, in], [out] -> [P, out]."""
        ...

    def norm_linear(
        self, x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float
    ) -> Tensor:
        """[P, H], [H], [out, H], [out] -> [P, out]: linear of rms_norm(x, norm, eps)."""
        ...

    def norm_gated_linear(self, x: Tensor, norm: Tensor, gate_up: Tensor, *, eps: float) -> Tensor:
        """[P, H], [H], [2 * I, H] -> [P, I]: silu(gate) * up, where norm_linear gives the gate,
        then the up projection (Shazeer 2020, SwiGLU)."""
        ...

    def add_linear(
        self, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> None:
        """residual [P, H] += linear(x, weight, bias), in place."""
        ...

    def queries(
        self, x: Tensor, decoder: Decoder, index: int, batch: Batch, cache: KVCache
    ) -> Tensor:
        """[P, H] -> [P, Hq, D]: what rope_and_cache gives of a layer's norm_linear."""
        ...

    def to_next_layer(
        self,
        x: Tensor,
        attended: Tensor,
        decoder: Decoder,
        index: int,
        batch: Batch,
        cache: KVCache,
    ) -> Tensor:
        """[P, H], [P, Hq * D] -> [P, Hq, D]: from a layer's attention to the queries of the next;
        x in place. See `next_layer_one_by_one`."""
        ...

    def rope_and_cache(
        self, qkv: Tensor, decoder: Decoder, index: int, batch: Batch, cache: KVCache
    ) -> Tensor:
        """[P, (Hq + 2 Hkv) * D] -> q [P, Hq, D].

        Splits qkv, normalizes each head of q and k (RMSNorm over D, where the layer has one),
        rotates both (Su et al. 2021, RoFormer; half-split pairs; cos_sin is float32 [max_len, D]:
        D/2 cosines then D/2 sines) and writes k and v to the tokens' slots of the layer's cache.
        """
        ...

    def attention(
        self, q: Tensor, batch: Batch, cache: KVCache, layer: int, *, scale: float
    ) -> Tensor:
        """[P, Hq, D] -> [P, Hq * D]: causal attention of each row over its blocks, the step's own
        tokens included."""
        ...

    def take_rows(self, x: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
        """[P, H], [S] -> [S, H], in `out` where it is given."""
        ...


def end_layer(ops: Ops, x: Tensor, attended: Tensor, layer: DecoderLayer, eps: float) -> None:
    """What follows a layer's attention [P, Hq * D]: the residual x [P, H] in place."""
    ops.add_linear(x, attended, layer.output, layer.output_bias)
    gated = ops.norm_gated_linear(x, layer.post_norm, layer.gate_up, eps=eps)
    ops.add_linear(x, gated, layer.down)


def queries_one_by_one(
    ops: Ops, x: Tensor, decoder: Decoder, index: int, batch: Batch, cache: KVCache
) -> Tensor:
    """Ops.queries of a backend that fuses nothing of it."""
    layer = decoder.layers[index]
    qkv = ops.norm_linear(x, layer.input_norm, layer.qkv, layer.qkv_bias, eps=decoder.eps)
    return ops.rope_and_cache(qkv, decoder, index, batch, cache)


def next_layer_one_by_one(
    ops: Ops,
    x: Tensor,
    attended: Tensor,
    decoder: Decoder,
    index: int,
    batch: Batch,
    cache: KVCache,
) -> Tensor:
    """Ops.to_next_layer of a backend that fuses nothing of it."""
    end_layer(ops, x, attended, decoder.layers[index], decoder.eps)
    return ops.queries(x, decoder, index + 1, batch, cache)
