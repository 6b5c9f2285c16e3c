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
    all_sample: bool = False
    """Every token is its row's last and samples: sample_tokens is 0, 1, 2, … False where nobody
    has said so."""
    samples: Batch | None = None
    """The sampled tokens as a step of their own, of one token a row, for a layer in which nothing
    else is read any more; None where that is not worth it. To be attended once the keys and values
    of all tokens stand in the cache."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """Hidden states and the RMSNorm behind them (Zhang & Sennrich 2019), which is applied by
    whatever takes them: x / sqrt(mean(x^2) + eps) * norm, in float32 inside."""

    x: Tensor
    """[P, H]: the residual stream, to which layers add in place."""
    norm: Tensor
    """[H]: the norm's gains."""
    left: Any = None
    """What the backend left beside x for the norm."""


@dataclass(frozen=True, slots=True)
class Logits:
    """What the next token is sampled by."""

    x: Tensor
    """[S, V]."""
    scanned: bool = False
    """Whether the backend has left for its sampler what that would read them for first."""


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

    def embed(
        self, table: Tensor, tokens: Tensor, norm: Tensor, out: Tensor | None = None
    ) -> Hidden:
        """[V, H], [P], [H] -> [P, H]: the rows of the table, in `out` where it is given."""
        ...

    def linear(
        self, hidden: Hidden, weight: Tensor, bias: Tensor | None = None, *, eps: float
    ) -> Tensor:
        """[P, H], [out, H], [out] -> [P, out], of the normalized hidden states."""
        ...

    def logits(self, hidden: Hidden, head: Tensor, *, eps: float) -> Logits:
        """[S, H], [V, H] -> [S, V]: `linear`, for the step's samples."""
        ...

    def gated_linear(self, hidden: Hidden, gate_up: Tensor, *, eps: float) -> Tensor:
        """[P, H], [2 * I, H] -> [P, I]: silu(gate) * up, where `linear` gives the gate, then the up
        projection (Shazeer 2020, SwiGLU)."""
        ...

    def add_linear(
        self,
        hidden: Hidden,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        norm: Tensor,
    ) -> Hidden:
        """hidden.x [P, H] += x weight^T + bias, in place. Behind it, `norm` [H] is the next."""
        ...

    def queries(
        self, hidden: Hidden, decoder: Decoder, index: int, batch: Batch, cache: KVCache
    ) -> Tensor:
        """[P, H] -> q [P, Hq, D] of the layer.

        Splits its qkv, normalizes each head of q and k (RMSNorm over D, where the layer has one),
        rotates both (Su et al. 2021, RoFormer; half-split pairs; cos_sin is float32 [max_len, D]:
        D/2 cosines then D/2 sines) and writes k and v to the tokens' slots of the layer's cache.
        """
        ...

    def keys_values(
        self, hidden: Hidden, decoder: Decoder, index: int, batch: Batch, cache: KVCache
    ) -> bool:
        """`queries` without queries: only keys and values are made. False, and nothing has been
        done, where the backend is not faster so."""
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
