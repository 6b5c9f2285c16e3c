"""The compute interface on our CUDA kernels; matrix products are cuBLAS's where it is faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zllm.cuda import activation, embedding, norm
from zllm.cuda.attention import PagedAttention
from zllm.cuda.decoder import MAX_ROWS, ResidentDecoder, ResidentLayer, supports
from zllm.cuda.decoder_plan import DecoderShape
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.linear import SkinnyLinear
from zllm.cuda.linear_many import ManyRows
from zllm.cuda.rope_cache import RopeCache, rope_cache
from zllm.runtime.kv_cache import KVCache
from zllm.runtime.ops import (
    Batch,
    Decoder,
    DecoderLayer,
    next_layer_one_by_one,
    queries_one_by_one,
)


class CudaOps:
    """Ops (runtime/ops.py). Everything is launched on torch's current stream."""

    def __init__(self, kernels: KernelLibrary, attention: PagedAttention) -> None:
        self.device = torch.device("cuda", kernels.device)
        self._kernels = kernels
        self._attention = attention
        self._skinny = SkinnyLinear(kernels)
        self._many = ManyRows(kernels)
        self._resident: dict[int, ResidentDecoder | None] = {}
        self._one = torch.ones(1, dtype=torch.float32, device=self.device)

    def decode(self, decoder: Decoder, batch: Batch, cache: KVCache) -> Tensor | None:
        hidden = self._decode(decoder, batch, cache)
        if hidden is None:
            # Before the first layer, so that all layers may read the batch early.
            self._attention.make_lists(batch.work)
        return hidden

    def _decode(self, decoder: Decoder, batch: Batch, cache: KVCache) -> Tensor | None:
        if batch.tokens.shape[0] > MAX_ROWS or batch.work.max_tiles:
            return None  # too many tokens for any, or rows of several tokens
        # A cache is known by its place: the weights stay where they are.
        place = cache.data.data_ptr()
        if place not in self._resident:
            self._resident = {place: _resident(self._kernels, decoder, cache)}
        resident = self._resident[place]
        if resident is None or batch.tokens.shape[0] > resident.most_rows:
            return None
        return resident.run(
            batch.tokens,
            batch.positions,
            batch.slots,
            batch.rows,
            batch.q_start,
            batch.kv_len,
            batch.block_table,
            scale=decoder.scale,
        )

    def embed(self, table: Tensor, tokens: Tensor) -> Tensor:
        return embedding.embed(self._kernels, table, tokens)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.rms_norm(self._kernels, x, weight, eps)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is None and self._few_rows(x, weight):
            return self._skinny.linear(x, weight)
        return F.linear(x, weight, bias)

    def norm_linear(
        self, x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float
    ) -> Tensor:
        if bias is None and self._fuses_norm(x, weight):
            return self._skinny.linear(x, weight, norm=norm, eps=eps)
        return self.linear(self.rms_norm(x, norm, eps), weight, bias)

    def norm_gated_linear(self, x: Tensor, norm: Tensor, gate_up: Tensor, *, eps: float) -> Tensor:
        if self._fuses_norm(x, gate_up):
            return self._skinny.linear(x, gate_up, norm=norm, eps=eps, gated=True)
        normed = self.rms_norm(x, norm, eps)
        if self._few_rows(normed, gate_up, gated=True):
            return self._skinny.linear(normed, gate_up, gated=True)
        n, k = gate_up.shape
        if self._many.supports_gated(normed.shape[0], n, k, normed.dtype):
            return self._many.gated(normed, gate_up)
        return activation.silu_mul(self._kernels, self.linear(normed, gate_up))

    def add_linear(
        self, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> None:
        if bias is None and self._few_rows(x, weight):
            self._skinny.linear(x, weight, residual, residual=residual)
            return
        # The product adds to what is there as it writes: no pass of its own.
        residual.addmm_(x, weight.t())
        if bias is not None:
            residual.add_(bias)

    def _few_rows(self, x: Tensor, weight: Tensor, gated: bool = False) -> bool:
        """Whether reading the weight is all that the product's time depends on."""
        n, k = weight.shape
        return self._skinny.supports(x.shape[0], n, k, x.dtype, gated)

    def _fuses_norm(self, x: Tensor, weight: Tensor) -> bool:
        few = x.shape[0] <= self._skinny.MAX_NORM_ROWS and x.dtype == torch.bfloat16
        return few and self._few_rows(x, weight)

    def queries(
        self, x: Tensor, decoder: Decoder, index: int, batch: Batch, cache: KVCache
    ) -> Tensor:
        layer = decoder.layers[index]
        n, k = layer.qkv.shape
        rotates = self._many.supports_qkv(x.shape[0], n, k, decoder.head_dim, x.dtype)
        if layer.qkv_bias is None and rotates:
            normed = self.rms_norm(x, layer.input_norm, decoder.eps)
            return self._many.qkv(normed, layer.qkv, self._rope(decoder, index, batch, cache))
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
        layer, following = decoder.layers[index], decoder.layers[index + 1]
        if not self._scales(x, layer, following):
            return next_layer_one_by_one(self, x, attended, decoder, index, batch, cache)
        skinny, eps = self._skinny, decoder.eps
        normed = skinny.add_linear_scaled(x, attended, layer.output, layer.post_norm)
        gated = skinny.linear_of_scaled(normed, layer.gate_up, eps=eps, gated=True)
        normed = skinny.add_linear_scaled(x, gated, layer.down, following.input_norm)
        qkv = skinny.linear_of_scaled(normed, following.qkv, eps=eps)
        return self.rope_and_cache(qkv, decoder, index + 1, batch, cache)

    def _scales(self, x: Tensor, layer: DecoderLayer, following: DecoderLayer) -> bool:
        """Whether all products between two layers' attentions leave norms to each other."""
        if layer.output_bias is not None or following.qkv_bias is not None:
            return False
        weights = (layer.output, layer.gate_up, layer.down, following.qkv)
        m, supports = x.shape[0], self._skinny.supports_scaled
        return all(supports(m, w.shape[0], w.shape[1], x.dtype) for w in weights)

    def rope_and_cache(
        self, qkv: Tensor, decoder: Decoder, index: int, batch: Batch, cache: KVCache
    ) -> Tensor:
        rope = self._rope(decoder, index, batch, cache)
        early = self._attention.lets_read_early(batch.work)
        return rope_cache(self._kernels, qkv, rope, early=early)

    def _rope(self, decoder: Decoder, index: int, batch: Batch, cache: KVCache) -> RopeCache:
        layer, scale = decoder.layers[index], self._scale(cache)
        return RopeCache(
            positions=batch.positions,
            slots=batch.slots,
            keys=cache.keys[index],
            values=cache.values[index],
            cos_sin=decoder.cos_sin,
            num_heads=decoder.num_heads,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            k_scale=scale,
            v_scale=scale,
            eps=decoder.eps,
        )

    def attention(
        self, q: Tensor, batch: Batch, cache: KVCache, layer: int, *, scale: float
    ) -> Tensor:
        kv_scale = self._scale(cache)
        return self._attention.run(
            q,
            cache.keys[layer],
            cache.values[layer],
            batch.block_table,
            batch.work,
            scale=scale,
            k_scale=kv_scale,
            v_scale=kv_scale,
        )

    def take_rows(self, x: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
        return embedding.take_rows(self._kernels, x, index, out=out)

    def _scale(self, cache: KVCache) -> Tensor | None:
        """What a float8 cache's entries are multiplied by. Keys are normalized and values small,
        so e4m3's range of 448 needs no other scale than 1 (docs/decisions/003-fp8-kv-scale.md)."""
        return self._one if cache.data.dtype == torch.float8_e4m3fn else None


def _resident(kernels: KernelLibrary, decoder: Decoder, cache: KVCache) -> ResidentDecoder | None:
    """The kernel that takes all layers at once; None where there is none for them."""
    first = decoder.layers[0]
    shape = DecoderShape(
        hidden_size=decoder.embedding.shape[1],
        intermediate_size=first.down.shape[1],
        num_heads=decoder.num_heads,
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        qk_norm=first.q_norm is not None,
        num_layers=len(decoder.layers),
    )
    if first.qkv_bias is not None or first.output_bias is not None:
        return None
    if not supports(kernels, shape, decoder.embedding.dtype, cache.data.dtype):
        return None
    layers = [
        ResidentLayer(
            layer.input_norm,
            layer.qkv,
            layer.q_norm,
            layer.k_norm,
            layer.output,
            layer.post_norm,
            layer.gate_up,
            layer.down,
            keys,
            values,
        )
        for layer, keys, values in zip(decoder.layers, cache.keys, cache.values, strict=True)
    ]
    return ResidentDecoder(
        kernels, shape, decoder.embedding, layers, decoder.cos_sin, eps=decoder.eps
    )
