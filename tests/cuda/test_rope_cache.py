"""Split, QK-norm, RoPE and cache write against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.accuracy import TOLERANCE, poisoned, relative_error
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.rope_cache import permute_cache, rope_cache, unpermute_cache
from zllm.errors import KernelError

FP8 = torch.float8_e4m3fn
MAX_LEN = 512


def _cos_sin(head_dim: int) -> Tensor:
    frequency = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(MAX_LEN, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float().cuda()


def _rotated(x: Tensor, weight: Tensor | None, cos_sin: Tensor, eps: float) -> Tensor:
    """[P, heads, D] in float64; cos_sin [P, D]."""
    if weight is not None:
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()
    cosine, sine = cos_sin.double()[:, None].chunk(2, dim=-1)
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1)


def _cache(blocks: int, heads: int, head_dim: int, dtype: torch.dtype, layers: int) -> Tensor:
    """[layers, K|V, blocks, heads, 16, D] that lies block-major."""
    data = torch.zeros(blocks, layers, 2, heads, 16, head_dim, device="cuda").to(dtype)
    return data.permute(1, 2, 0, 3, 4, 5)


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
    blocks, layers, eps = tokens // 8 + 4, 3, 1e-6
    cache = _cache(blocks, kv_heads, head_dim, cache_dtype, layers)
    keys, values = cache[1]
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device="cuda").to(dtype)
    positions = torch.randint(MAX_LEN, (tokens,), dtype=torch.int32, device="cuda")
    slots = torch.randperm(blocks * 16, device="cuda")[:tokens].int()
    cos_sin = _cos_sin(head_dim)
    q_norm, k_norm = (
        (torch.randn(2, head_dim, device="cuda") + 1).to(dtype).unbind() if normed else (None, None)
    )
    k_scale, v_scale = (
        torch.tensor([[0.5], [2.0]], device="cuda")
        if cache_dtype == FP8
        else (
            None,
            None,
        )
    )
    q = rope_cache(
        kernels,
        qkv,
        positions,
        slots,
        keys,
        values,
        cos_sin,
        num_heads=heads,
        q_norm=q_norm,
        k_norm=k_norm,
        k_scale=k_scale,
        v_scale=v_scale,
        eps=eps,
        early=early,
        out=poisoned(tokens, heads, head_dim, dtype=dtype),
    )
    split = qkv.double().view(tokens, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    at = cos_sin[positions.long()]
    assert relative_error(q, _rotated(split[0], q_norm, at, eps)) < TOLERANCE[dtype]

    wanted = {"keys": _rotated(split[1], k_norm, at, eps), "values": split[2]}
    for (name, expected), stored, scale in zip(
        wanted.items(), (keys, values), (k_scale, v_scale), strict=True
    ):
        plain = unpermute_cache(stored.contiguous()).float()
        block, offset = slots.long() // 16, slots.long() % 16
        got = plain[block, :, offset] * (1.0 if scale is None else scale)
        tolerance = 0.05 if cache_dtype == FP8 else TOLERANCE[cache_dtype]
        assert relative_error(got, expected) < tolerance, name
        plain[block, :, offset] = 0
        assert not plain.any(), f"{name}: nothing but the tokens' slots is written"
    assert not cache[0].float().any()
    assert not cache[2].float().any()


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
    keys, values = _cache(4, 2, 64, torch.bfloat16, 1)[0]
    qkv = torch.zeros(3, (4 + 4) * 64, device="cuda", dtype=torch.bfloat16)
    index = torch.zeros(3, dtype=torch.int32, device="cuda")
    cos_sin = _cos_sin(64)
    weight = torch.ones(64, device="cuda", dtype=torch.bfloat16)
    good = (qkv, index, index, keys, values, cos_sin)
    rope_cache(kernels, *good, num_heads=4)
    for name, position, wrong in (
        ("qkv has shape", 0, qkv[:, :64].contiguous()),
        ("positions is torch.int64", 1, index.long()),
        ("slots has shape", 2, index[:2]),
        ("keys is torch.float32", 3, keys.float()),
        ("values has shape", 4, values[:, :1]),
        ("cos_sin is torch.bfloat16", 5, cos_sin.bfloat16()),
    ):
        arguments = [*good[:position], wrong, *good[position + 1 :]]
        if position == 3:
            arguments[4] = wrong
        with pytest.raises(KernelError, match=name):
            rope_cache(kernels, *arguments, num_heads=4)
    with pytest.raises(KernelError, match="give both or neither"):
        rope_cache(kernels, *good, num_heads=4, q_norm=weight)
