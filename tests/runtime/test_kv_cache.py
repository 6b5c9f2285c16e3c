"""Both layouts hold the same cache."""

from __future__ import annotations

import pytest
import torch

from tests.runtime.checkpoints import VOCAB
from zllm.runtime.kv_cache import allocate_kv_cache, block_bytes, copy_blocks
from zllm.runtime.model_config import ModelConfig

CONFIG = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
CPU = torch.device("cpu")
LAYOUTS = ("block_major", "layer_major")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_cover_the_allocation_without_overlap(layout, dtype):
    cache = allocate_kv_cache(CONFIG, 5, dtype, CPU, layout)
    assert cache.num_blocks == 5
    assert not cache.data.any()
    views = [*cache.keys, *cache.values]
    assert all(view.shape == (5, 2, 16, 8) for view in views)
    for number, view in enumerate(views):
        view.fill_(number + 1)
    for number, view in enumerate(views):
        assert bool((view == number + 1).all())
    assert cache.data.all()
    assert cache.data.nbytes == 5 * block_bytes(CONFIG, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_keys_of_one_head_in_a_block_are_one_run(layout):
    cache = allocate_kv_cache(CONFIG, 5, torch.float32, CPU, layout)
    for view in [*cache.keys, *cache.values]:
        assert view[3, 1].is_contiguous()


@pytest.mark.parametrize("source_layout", LAYOUTS)
@pytest.mark.parametrize("target_layout", LAYOUTS)
def test_a_copied_block_is_copied_over_all_layers(source_layout, target_layout):
    source = allocate_kv_cache(CONFIG, 5, torch.float32, CPU, source_layout)
    target = allocate_kv_cache(CONFIG, 4, torch.float32, CPU, target_layout)
    source.data.normal_()
    copy_blocks(source, target, torch.tensor([[4, 1], [2, 3]], dtype=torch.int32))
    for layer in range(3):
        assert torch.equal(target.keys[layer][[1, 3]], source.keys[layer][[4, 2]])
        assert torch.equal(target.values[layer][[1, 3]], source.values[layer][[4, 2]])
        assert not target.keys[layer][[0, 2]].any()


def test_no_pairs_copy_nothing():
    cache = allocate_kv_cache(CONFIG, 5, torch.float32, CPU)
    cache.data.normal_()
    before = cache.data.clone()
    copy_blocks(cache, cache, torch.zeros(0, 2, dtype=torch.int32))
    assert torch.equal(cache.data, before)
