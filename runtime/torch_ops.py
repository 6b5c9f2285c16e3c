"""The compute interface in torch: the reference of every kernel, and the CPU's own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from zllm.runtime.kv_cache import KVCache
from zllm.runtime.ops import Batch, Decoder, Hidden, Logits
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

    def embed(
        self, table: Tensor, tokens: Tensor, norm: Tensor, out: Tensor | None = None
    ) -> Hidden:
        return Hidden(self.take_rows(table, tokens, out), norm)

    def linear(
        self, hidden: Hidden, weight: Tensor, bias: Tensor | None = None, *, eps: float
    ) -> Tensor:
        normed = functional.rms_norm(hidden.x, hidden.norm.shape, hidden.norm, eps)
        return self._product(normed, weight, bias)

    def logits(self, hidden: Hidden, head: Tensor, *, eps: float) -> Logits:
        return Logits(self.linear(hidden, head, eps=eps))

    def gated_linear(self, hidden: Hidden, gate_up: Tensor, *, eps: float) -> Tensor:
        gate, up = self.linear(hidden, gate_up, eps=eps).chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    def add_linear(
        self,
        hidden: Hidden,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        norm: Tensor,
    ) -> Hidden:
        return Hidden(hidden.x.add_(self._product(x, weight, bias)), norm)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._onednn and x.dtype is torch.float32 and weight.numel() >= _LARGE:
            # torch gives float32 to a BLAS that multiplies one row on one core alone, and few
            # rows at half the speed of oneDNN.
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
            return product
        return functional.linear(x, weight, bias)

    def queries(
        self, hidden: Hidden, decoder: Decoder, index: int, batch: Batch, cache: KVCache
    ) -> Tensor:
        return self._heads(hidden, decoder, index, batch, cache, decoder.num_heads)

    def keys_values(
        self, hidden: Hidden, decoder: Decoder, index: int, batch: Batch, cache: KVCache
    ) -> bool:
        self._heads(hidden, decoder, index, batch, cache, 0)
        return True

    def _heads(
        self,
        hidden: Hidden,
        decoder: Decoder,
        index: int,
        batch: Batch,
        cache: KVCache,
        num_heads: int,
    ) -> Tensor:
        """`queries`, of the layer's last `num_heads` heads alone."""
        layer, cos_sin = decoder.layers[index], decoder.cos_sin
        num_kv_heads, head_dim = decoder.num_kv_heads, decoder.head_dim
        rows = slice((decoder.num_heads - num_heads) * head_dim, None)
        bias = None if layer.qkv_bias is None else layer.qkv_bias[rows]
        qkv = self.linear(hidden, layer.qkv[rows], bias, eps=decoder.eps)
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
