"""Split, QK-norm, RoPE and cache write against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.cuda.accuracy import poisoned
from tests.cuda.rotation import FP8, angles, cache_of, expect_rotated, rope_case
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.rope_cache import RopeCache, permute_cache, rope_cache, unpermute_cache
from zllm.errors import KernelError

CASES = [
    pytest.param(5, 4, 2, 128, torch.bfloat16, torch.bfloat16, True, id="small"),
    (256, 32, 8, 128, torch.bfloat16, torch.bfloat16, True),
    (33, 3, 1, 64, torch.bfloat16, torch.bfloat16, False),
    (17, 6, 2, 96, torch.bfloat16, torch.bfloat16, True),
    (40, 8, 4, 256, torch.bfloat16, torch.bfloat16, True),
    (70, 14, 2, 64, torch.float16, torch.float16, True),
    (9, 4, 4, 128, torch.float32, torch.float32, True),
    (9, 4, 4, 256, torch.float32, torch.bfloat16, False),
    (50, 16, 8, 128, torch.bfloat16, FP8, True),
    (50, 16, 8, 96, torch.bfloat16, FP8, False),
    (50, 16, 8, 64, torch.float32, FP8, False),
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "dtype", "cache_dtype", "normed"), CASES
)
@pytest.mark.parametrize("early", [False, True])
def test_rope_cache(
    kernels: KernelLibrary,
    early: bool,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    normed: bool,
) -> None:
    rope, cache = rope_case(tokens, heads, kv_heads, head_dim, dtype, cache_dtype, normed=normed)
    qkv = torch.randn(tokens, rope.width, device="cuda").to(dtype)
    out = poisoned(tokens, heads, head_dim, dtype=dtype)
    q = rope_cache(kernels, qkv, rope, early=early, out=out)
    expect_rotated(rope, cache, qkv.double(), q)


@pytest.mark.parametrize("row_bytes", [64, 96, 128, 192, 256, 512, 1024])
def test_the_permuted_order_is_hoppers_swizzle(row_bytes: int) -> None:
    """Columns of 128, 64 and 32 bytes, whose chunks move by the address bits above them."""
    run = torch.arange(16 * row_bytes // 2, dtype=torch.int16).view(1, 16, row_bytes // 2)
    stored = permute_cache(run)
    assert torch.equal(unpermute_cache(stored), run)
    flat = stored.flatten()
    for row in range(16):
        for chunk in range(row_bytes // 16):
            base, width = 0, 128
            left = chunk * 16
            while left >= width or base + 16 * width > 16 * row_bytes:
                if base + 16 * width <= 16 * row_bytes:
                    left -= width
                    base += 16 * width
                else:
                    width //= 2
            inside = row * width + left
            # 128-byte swizzle: address bits 4-6 ^= bits 7-9; 64: 4-5 ^= 7-8; 32: 4 ^= 7.
            address = base + (inside ^ ((inside >> 7) % (width // 16) << 4))
            assert flat[address // 2] == run[0, row, chunk * 8]


@pytest.mark.gpu
def test_arguments_that_do_not_fit_are_named(kernels: KernelLibrary) -> None:
    keys, values = cache_of(4, 2, 64, torch.bfloat16, 1)[0]
    qkv = torch.zeros(3, (4 + 4) * 64, device="cuda", dtype=torch.bfloat16)
    index = torch.zeros(3, dtype=torch.int32, device="cuda")
    good = RopeCache(index, index, keys, values, angles(64), num_heads=4)
    rope_cache(kernels, qkv, good)
    with pytest.raises(KernelError, match="qkv has shape"):
        rope_cache(kernels, qkv[:, :64].contiguous(), good)
    for message, wrong in (
        ("positions is torch.int64", {"positions": index.long()}),
        ("slots has shape", {"slots": index[:2]}),
        ("keys is torch.float32", {"keys": keys.float(), "values": keys.float()}),
        ("values has shape", {"values": values[:, :1]}),
        ("cos_sin is torch.bfloat16", {"cos_sin": good.cos_sin.bfloat16()}),
        ("give both or neither", {"q_norm": torch.ones(64, device="cuda").bfloat16()}),
    ):
        with pytest.raises(KernelError, match=message):
            rope_cache(kernels, qkv, replace(good, **wrong))
