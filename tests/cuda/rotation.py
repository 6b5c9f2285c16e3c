"""Rotated heads and what stands in the cache, in float64: for the kernels that write both."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.cuda.accuracy import TOLERANCE, relative_error
from zllm.cuda.rope_cache import RopeCache, unpermute_cache

FP8 = torch.float8_e4m3fn
MAX_LEN = 512


def angles(head_dim: int) -> Tensor:
    """float32 [MAX_LEN, D] cosines and sines."""
    frequency = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(MAX_LEN, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float().cuda()


def cache_of(blocks: int, heads: int, head_dim: int, dtype: torch.dtype, layers: int) -> Tensor:
    """[layers, K|V, blocks, heads, 16, D] that lies block-major."""
    data = torch.zeros(blocks, layers, 2, heads, 16, head_dim, device="cuda").to(dtype)
    return data.permute(1, 2, 0, 3, 4, 5)


def rope_case(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    *,
    normed: bool,
) -> tuple[RopeCache, Tensor]:
    """Random positions, slots and gains, and the cache of three layers whose second is written."""
    blocks = tokens // 8 + 4
    cache = cache_of(blocks, kv_heads, head_dim, cache_dtype, layers=3)
    gains = (torch.randn(2, head_dim, device="cuda") + 1).to(dtype)
    scales = torch.tensor([[0.5], [2.0]], device="cuda")
    rope = RopeCache(
        positions=torch.randint(MAX_LEN, (tokens,), dtype=torch.int32, device="cuda"),
        slots=torch.randperm(blocks * 16, device="cuda")[:tokens].int(),
        keys=cache[1][0],
        values=cache[1][1],
        cos_sin=angles(head_dim),
        num_heads=heads,
        q_norm=gains[0] if normed else None,
        k_norm=gains[1] if normed else None,
        k_scale=scales[0] if cache_dtype == FP8 else None,
        v_scale=scales[1] if cache_dtype == FP8 else None,
    )
    return rope, cache


def expect_rotated(rope: RopeCache, cache: Tensor, qkv: Tensor, q: Tensor) -> None:
    """That q [P, Hq, D] and the cache hold what qkv [P, width], float64, asks for, and no more."""
    heads, kv_heads = rope.num_heads, rope.num_kv_heads
    split = qkv.view(len(qkv), -1, rope.head_dim).split([heads, kv_heads, kv_heads], dim=1)
    at = rope.cos_sin[rope.positions.long()]
    expected = _rotated(split[0], rope.q_norm, at, rope.eps)
    assert q.shape == expected.shape
    assert not heads or relative_error(q, expected) < TOLERANCE[q.dtype]
    for name, stored, scale, wanted in (
        ("keys", rope.keys, rope.k_scale, _rotated(split[1], rope.k_norm, at, rope.eps)),
        ("values", rope.values, rope.v_scale, split[2]),
    ):
        plain = unpermute_cache(stored.contiguous()).float()
        block, offset = rope.slots.long() // 16, rope.slots.long() % 16
        got = plain[block, :, offset] * (1.0 if scale is None else scale)
        tolerance = 0.05 if stored.dtype == FP8 else TOLERANCE[stored.dtype]
        assert relative_error(got, wanted) < tolerance, name
        plain[block, :, offset] = 0
        assert not plain.any(), f"{name}: nothing but the tokens' slots is written"
    assert not cache[0].float().any()
    assert not cache[2].float().any()


def _rotated(x: Tensor, weight: Tensor | None, cos_sin: Tensor, eps: float) -> Tensor:
    """[P, heads, D] in float64; cos_sin [P, D]."""
    if weight is not None:
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()
    cosine, sine = cos_sin.double()[:, None].chunk(2, dim=-1)
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1)
