"""The compute interface on our CUDA kernels; matrix products are cuBLAS's where it is faster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from zllm.cuda import activation, embedding
from zllm.cuda.attention import PagedAttention
from zllm.cuda.decoder import MAX_ROWS, ResidentDecoder, ResidentLayer, supports
from zllm.cuda.decoder_plan import DecoderShape
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.linear import SkinnyLinear
from zllm.cuda.linear_many import ManyRows, NormsAhead
from zllm.cuda.logit_chunks import LogitChunks
from zllm.cuda.norm import rms_norm
from zllm.cuda.rope_cache import RopeCache, rope_cache
from zllm.runtime.kv_cache import KVCache
from zllm.runtime.ops import Batch, Decoder, Hidden, Logits


class CudaOps:
    """Ops (runtime/ops.py). Everything is launched on torch's current stream."""

    def __init__(
        self,
        kernels: KernelLibrary,
        attention: PagedAttention,
        chunks_of: Callable[[int], LogitChunks] | None = None,
        *,
        folded_norms: int = 0,
    ) -> None:
        """`chunks_of` a number of samples: what `logits` may fill for whoever samples them.
        `folded_norms`: how many norms the layers have, where the gains of all are ones."""
        self._chunks_of = chunks_of
        self._folded_norms = folded_norms
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

    def embed(
        self, table: Tensor, tokens: Tensor, norm: Tensor, out: Tensor | None = None
    ) -> Hidden:
        if self._skinny.takes_norms(tokens.shape[0], table.dtype):
            x, left = embedding.embed_scaled(self._kernels, table, tokens, norm, out=out)
            return Hidden(x, norm, left)
        x, ahead = embedding.embed(self._kernels, table, tokens, out=out), None
        if self._folded_norms and len(x) >= self._many.MIN_ROWS:
            ahead = NormsAhead.of(self._folded_norms, len(x), self.device)
        return Hidden(x, norm, ahead)

    def linear(
        self, hidden: Hidden, weight: Tensor, bias: Tensor | None = None, *, eps: float
    ) -> Tensor:
        return self._linear(hidden, weight, bias, eps)

    def logits(self, hidden: Hidden, head: Tensor, *, eps: float) -> Logits:
        (m, dtype), (n, k) = (hidden.x.shape[0], hidden.x.dtype), head.shape
        chunks = None
        if m > self._skinny.MAX_NORM_ROWS and self._skinny.leaves_chunks(m, n, k, dtype):
            chunks = self._chunks_of(m) if self._chunks_of is not None else None
        x = self._linear(hidden, head, None, eps, chunks)
        return Logits(x, scanned=chunks is not None)

    def gated_linear(self, hidden: Hidden, gate_up: Tensor, *, eps: float) -> Tensor:
        product = self._of_few_rows(hidden, gate_up, None, eps, gated=True)
        if product is not None:
            return product
        (n, k), m = gate_up.shape, hidden.x.shape[0]
        if self._many.supports_gated(m, n, k, hidden.x.dtype):
            x, norm = self._for_many(hidden, eps)
            return self._many.gated(x, gate_up, norm=norm, eps=eps)
        return activation.silu_mul(self._kernels, F.linear(self._normed(hidden, eps), gate_up))

    def add_linear(
        self,
        hidden: Hidden,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        norm: Tensor,
    ) -> Hidden:
        residual, skinny = hidden.x, self._skinny
        (m, k), n = x.shape, weight.shape[0]
        if bias is None and skinny.supports_scaled(m, n, k, x.dtype):
            left = skinny.add_linear_scaled(residual, x, weight, norm)
            return Hidden(residual, norm, left)
        if bias is None and skinny.supports(m, n, k, x.dtype):
            skinny.linear(x, weight, residual, residual=residual)
            return Hidden(residual, norm)
        # The product adds to what is there as it writes: no pass of its own.
        residual.addmm_(x, weight.t())
        if bias is not None:
            residual.add_(bias)
        ahead = hidden.left.behind() if isinstance(hidden.left, NormsAhead) else None
        return Hidden(residual, norm, ahead)

    def queries(
        self, hidden: Hidden, decoder: Decoder, index: int, batch: Batch, cache: KVCache
    ) -> Tensor:
        layer, eps, head_dim = decoder.layers[index], decoder.eps, decoder.head_dim
        rope = self._rope(decoder, index, batch, cache)
        early = self._attention.lets_read_early(batch.work)
        if layer.qkv_bias is None:
            (m, dtype), (n, k) = (hidden.x.shape[0], hidden.x.dtype), layer.qkv.shape
            if hidden.left is not None and self._skinny.supports_qkv(m, n, k, head_dim, dtype):
                return self._skinny.qkv_of_scaled(
                    hidden.left, layer.qkv, rope, eps=eps, early=early
                )
            if self._many.supports_qkv(m, n, k, head_dim, dtype):
                x, norm = self._for_many(hidden, eps)
                return self._many.qkv(x, layer.qkv, rope, norm=norm)
        qkv = self.linear(hidden, layer.qkv, layer.qkv_bias, eps=eps)
        return rope_cache(self._kernels, qkv, rope, early=early)

    def keys_values(
        self, hidden: Hidden, decoder: Decoder, index: int, batch: Batch, cache: KVCache
    ) -> bool:
        layer, head_dim = decoder.layers[index], decoder.head_dim
        weight = layer.qkv[decoder.num_heads * head_dim :]
        (m, dtype), (n, k) = (hidden.x.shape[0], hidden.x.dtype), weight.shape
        # However its tiles fill the last round, all queries and their attention would take longer.
        fused = layer.qkv_bias is None and self._many.takes_qkv(m, n, k, head_dim, dtype)
        if fused:
            x, norm = self._for_many(hidden, decoder.eps)
            rope = replace(self._rope(decoder, index, batch, cache), num_heads=0)
            self._many.qkv(x, weight, rope, norm=norm)
        return fused

    def _linear(
        self,
        hidden: Hidden,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        chunks: LogitChunks | None = None,
    ) -> Tensor:
        product = self._of_few_rows(hidden, weight, bias, eps, chunks=chunks)
        if product is not None:
            return product
        return F.linear(self._normed(hidden, eps), weight, bias)

    def _of_few_rows(
        self,
        hidden: Hidden,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        gated: bool = False,
        chunks: LogitChunks | None = None,
    ) -> Tensor | None:
        """The product where its time depends on reading the weight alone, or None."""
        skinny, x, (n, k) = self._skinny, hidden.x, weight.shape
        m = x.shape[0]
        if bias is not None or not skinny.supports(m, n, k, x.dtype, gated):
            return None
        if hidden.left is not None and skinny.supports_scaled(m, n, k, x.dtype):
            return skinny.linear_of_scaled(hidden.left, weight, eps=eps, gated=gated, chunks=chunks)
        if m <= skinny.MAX_NORM_ROWS and x.dtype == torch.bfloat16:
            return skinny.linear(x, weight, norm=hidden.norm, eps=eps, gated=gated)
        return skinny.linear(self._normed(hidden, eps), weight, gated=gated, chunks=chunks)

    def _for_many(self, hidden: Hidden, eps: float) -> tuple[Tensor, NormsAhead | None]:
        """What a layer's products take with many rows: a norm without gains is theirs."""
        if not self._folded_norms:
            return self._normed(hidden, eps), None
        ahead = hidden.left
        if ahead is None:
            ahead = NormsAhead.of(1, hidden.x.shape[0], self.device)
        return hidden.x, ahead

    def _normed(self, hidden: Hidden, eps: float) -> Tensor:
        return rms_norm(self._kernels, hidden.x, hidden.norm, eps)

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
