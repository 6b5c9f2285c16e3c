"""The compute interface in torch: the reference of every kernel, and the CPU's own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from zllm.runtime.kv_cache import KVCache
from zllm.runtime.ops import Batch, Decoder, next_layer_one_by_one, queries_one_by_one
from zllm.runtime.torch_attention import AttentionWork, attend, write_kv

_LARGE = 2**19
"""Elements of a matrix from which oneDNN's faster product makes up for its dearer call."""


class TorchOps:
    """Ops (runtime/ops.py) on torch's own kernels. Batches come from `torch_batch.prepare`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._onednn = device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise")

    def decode(self, decoder: Decoder, batch: Batch, cache: KVCache) -> Tensor | None:
        return None

    def embed(self, table: Tensor, tokens: Tensor) -> Tensor:
        return functional.embedding(tokens, table)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, eps)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._onednn and x.dtype is torch.float32 and weight.numel() >= _LARGE:
            # torch gives float32 to a BLAS that multiplies one row on one core alone, and few
            # rows at half the speed of oneDNN.
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
            return product
        return functional.linear(x, weight, bias)

    def norm_linear(
        self, x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float
    ) -> Tensor:
        return self.linear(self.rms_norm(x, norm, eps), weight, bias)

    def norm_gated_linear(self, x: Tensor, norm: Tensor, gate_up: Tensor, *, eps: float) -> Tensor:
        gate, up = self.norm_linear(x, norm, gate_up, eps=eps).chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    def add_linear(
        self, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> None:
        residual.add_(self.linear(x, weight, bias))

    def queries(
        self, x: Tensor, decoder: Decoder, index: int, batch: Batch, cache: KVCache
    ) -> Tensor:
        return queries_one_by_one(self, x, decoder, index, batch, cache)

    def to_next_layer(
        self,
        x: Tensor,
        attended: Tensor,
        decoder: Decoder,
        index: int,
        batch: Batch,
        cache: KVCache,
    ) -> Tensor:
        return next_layer_one_by_one(self, x, attended, decoder, index, batch, cache)

    def rope_and_cache(
        self, qkv: Tensor, decoder: Decoder, index: int, batch: Batch, cache: KVCache
    ) -> Tensor:
        num_heads, num_kv_heads, head_dim = (
            decoder.num_heads,
            decoder.num_kv_heads,
            decoder.head_dim,
        )
        layer, cos_sin = decoder.layers[index], decoder.cos_sin
        heads = qkv.view(-1, num_heads + 2 * num_kv_heads, head_dim)
        q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        if layer.q_norm is not None:
            q = functional.rms_norm(q, (head_dim,), layer.q_norm, decoder.eps)
        if layer.k_norm is not None:
            k = functional.rms_norm(k, (head_dim,), layer.k_norm, decoder.eps)
        work: AttentionWork = batch.work
        rotation = work.rotations.get(id(cos_sin))
        if rotation is None:
            rotation = _rotation(cos_sin, batch.positions, qkv.dtype)
            work.rotations[id(cos_sin)] = rotation
        write_kv(torch.cat([_rotate(k, *rotation), v], dim=1), work, cache, index)
        return _rotate(q, *rotation)

    def attention(
        self, q: Tensor, batch: Batch, cache: KVCache, layer: int, *, scale: float
    ) -> Tensor:
        return attend(q, batch.work, cache, layer, scale)

    def take_rows(self, x: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.index_select(x, 0, index, out=out)


def _rotation(cos_sin: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[P, 1, D] cosines twice, and sines once negated, so that rotating takes two products."""
    cos, sin = cos_sin.index_select(0, positions)[:, None].to(dtype).chunk(2, dim=-1)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[P, heads, D]: pairs (i, i + D/2) turn by their angle."""
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, x.roll(half, -1), sin)
