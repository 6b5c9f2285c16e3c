"""Qwen3 (dense): pre-norm decoder, grouped-query attention with QK-norm, RoPE and SwiGLU.

Yang et al. 2025, "Qwen3 Technical Report".
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from zllm.runtime.kv_cache import KVCache
from zllm.runtime.model_config import ModelConfig
from zllm.runtime.models.parameters import Parameter, Weights, bias, linear, norm
from zllm.runtime.ops import Batch, Decoder, DecoderLayer, Hidden, Logits, Ops
from zllm.runtime.rope import rope_table


class Qwen3:
    """The decoder over its weights. It keeps no state from step to step."""

    def __init__(
        self, config: ModelConfig, weights: Weights, max_model_len: int, device: torch.device
    ) -> None:
        self.config = config
        self.decoder = Decoder(
            embedding=weights["embedding"],
            layers=tuple(_layer(weights, f"layers.{i}.") for i in range(config.num_layers)),
            cos_sin=rope_table(config.rope, config.head_dim, max_model_len, device),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            eps=config.rms_norm_eps,
        )
        self.head = weights["embedding" if config.tie_word_embeddings else "head"]
        self.final_norm = weights["final_norm"]

    @staticmethod
    def parameters(config: ModelConfig) -> Iterator[Parameter]:
        """All weights, with the names of Hugging Face's checkpoints as their sources."""
        hidden, inner = config.hidden_size, config.intermediate_size
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        yield linear(
            "embedding",
            hidden,
            ("model.embed_tokens.weight", config.vocab_size),
            copy="lm_head.weight" if config.tie_word_embeddings else None,
        )
        for i in range(config.num_layers):
            ours, theirs = f"layers.{i}.", f"model.layers.{i}."
            attention, mlp = theirs + "self_attn.", theirs + "mlp."
            yield norm(ours + "input_norm", hidden, theirs + "input_layernorm.weight")
            yield linear(
                ours + "qkv",
                hidden,
                (attention + "q_proj.weight", q_size),
                (attention + "k_proj.weight", kv_size),
                (attention + "v_proj.weight", kv_size),
                norm=ours + "input_norm",
            )
            yield norm(ours + "q_norm", config.head_dim, attention + "q_norm.weight")
            yield norm(ours + "k_norm", config.head_dim, attention + "k_norm.weight")
            yield linear(ours + "output", q_size, (attention + "o_proj.weight", hidden))
            if config.attention_bias:
                yield bias(
                    ours + "qkv_bias",
                    (attention + "q_proj.bias", q_size),
                    (attention + "k_proj.bias", kv_size),
                    (attention + "v_proj.bias", kv_size),
                )
                yield bias(ours + "output_bias", (attention + "o_proj.bias", hidden))
            yield norm(ours + "post_norm", hidden, theirs + "post_attention_layernorm.weight")
            yield linear(
                ours + "gate_up",
                hidden,
                (mlp + "gate_proj.weight", inner),
                (mlp + "up_proj.weight", inner),
                norm=ours + "post_norm",
            )
            yield linear(ours + "down", inner, (mlp + "down_proj.weight", hidden))
        yield norm("final_norm", hidden, "model.norm.weight")
        if not config.tie_word_embeddings:
            yield linear("head", hidden, ("lm_head.weight", config.vocab_size))

    def forward(self, ops: Ops, batch: Batch, cache: KVCache, out: Tensor | None = None) -> Hidden:
        """The hidden states [S, H] of the sampled tokens, behind which the last norm stands; in
        `out` where it is given, unless `batch.all_sample`."""
        decoder, layers = self.decoder, self.decoder.layers
        x = ops.decode(decoder, batch, cache)
        if x is not None:
            return Hidden(ops.take_rows(x, batch.sample_tokens, out), self.final_norm)
        hidden = ops.embed(decoder.embedding, batch.tokens, layers[0].input_norm)
        norms = (*(layer.input_norm for layer in layers[1:]), self.final_norm)
        few_sample = len(batch.sample_tokens) < len(batch.tokens)
        for index, (layer, next_norm) in enumerate(zip(layers, norms, strict=True)):
            if few_sample and layer is layers[-1]:
                hidden, attended = self._attend_samples(ops, hidden, index, batch, cache, out)
            else:
                attended = self._attend(ops, hidden, index, batch, cache)
            hidden = ops.add_linear(
                hidden, attended, layer.output, layer.output_bias, norm=layer.post_norm
            )
            gated = ops.gated_linear(hidden, layer.gate_up, eps=decoder.eps)
            hidden = ops.add_linear(hidden, gated, layer.down, norm=next_norm)
        if few_sample or batch.all_sample:
            return hidden
        return Hidden(ops.take_rows(hidden.x, batch.sample_tokens, out), hidden.norm)

    def _attend(self, ops: Ops, hidden: Hidden, index: int, batch: Batch, cache: KVCache) -> Tensor:
        """[P, H] -> [P, Hq * D]; the layer's keys and values are written."""
        q = ops.queries(hidden, self.decoder, index, batch, cache)
        return ops.attention(q, batch, cache, index, scale=self.decoder.scale)

    def _attend_samples(
        self,
        ops: Ops,
        hidden: Hidden,
        index: int,
        batch: Batch,
        cache: KVCache,
        out: Tensor | None,
    ) -> tuple[Hidden, Tensor]:
        """[P, H] -> [S, H], [S, Hq * D]: the sampled tokens' part of `hidden` and `_attend`. Of the
        others, nothing is read behind the last layer's attention but keys and values."""
        picked, samples = batch.sample_tokens, batch.samples
        if samples is not None and ops.keys_values(hidden, self.decoder, index, batch, cache):
            taken = ops.embed(hidden.x, picked, hidden.norm, out)
            return taken, self._attend(ops, taken, index, samples, cache)
        attended = self._attend(ops, hidden, index, batch, cache)
        taken = Hidden(ops.take_rows(hidden.x, picked, out), hidden.norm)
        return taken, ops.take_rows(attended, picked)

    def logits(self, ops: Ops, hidden: Hidden) -> Logits:
        """What `forward` gives [S, H] -> [S, V], in the model's dtype."""
        return ops.logits(hidden, self.head, eps=self.decoder.eps)


def _layer(weights: Weights, prefix: str) -> DecoderLayer:
    return DecoderLayer(
        input_norm=weights[prefix + "input_norm"],
        qkv=weights[prefix + "qkv"],
        qkv_bias=weights.get(prefix + "qkv_bias"),
        q_norm=weights[prefix + "q_norm"],
        k_norm=weights[prefix + "k_norm"],
        output=weights[prefix + "output"],
        output_bias=weights.get(prefix + "output_bias"),
        post_norm=weights[prefix + "post_norm"],
        gate_up=weights[prefix + "gate_up"],
        down=weights[prefix + "down"],
    )
