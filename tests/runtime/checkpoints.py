"""Random tiny Qwen3 checkpoints, made and run by Hugging Face transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

VOCAB = 97
"""No multiple of anything, so that padding shows."""


def make_hf_model(seed: int = 0, **changes: Any) -> Qwen3ForCausalLM:
    """A float32 model whose logits differ clearly from token to token."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    settings.update(changes)
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**settings)).eval()
    with torch.no_grad():
        # Transformers sets norms to one and biases to zero; drawn at random, a wrong one shows.
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.uniform_(0.5, 1.5)
    return model


def save(model: Qwen3ForCausalLM, folder: Path, **options: Any) -> Path:
    """Write the checkpoint as transformers does."""
    model.save_pretrained(folder, **options)
    return folder


@torch.inference_mode()
def greedy(model: Qwen3ForCausalLM, prompt: list[int], count: int) -> list[int]:
    """The `count` tokens that transformers would generate."""
    tokens = torch.tensor([prompt])
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False
    )
    return [int(token) for token in out[0, len(prompt) :]]


@torch.inference_mode()
def all_logits(model: Qwen3ForCausalLM, tokens: list[int]) -> Tensor:
    """[T, V] the logits after each token."""
    logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits
