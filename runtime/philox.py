"""Philox4x32-10, a counter-based random generator (Salmon et al. 2011, "Parallel random numbers:
as easy as 1, 2, 3"). It holds no state: a draw depends on its key and counter alone, so a
sequence gets the same numbers alone, in any batch and on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LARGEST_BELOW_1 = 1.0 - 2.0**-24

OF_TOKENS, OF_CHUNKS = 0, 1
"""What draws noise, as the counter's third word: their noises are independent."""

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(key: tuple[Tensor, Tensor], counter: Words) -> Words:
    """Four random words for each counter. All words are int64 tensors in [0, 2^32)."""
    key0, key1 = key
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        # The product of two 32-bit words may wrap int64's sign; its bits are right all the same.
        low = c0 * _MULTIPLIERS[0]
        high = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (high >> 32 & _MASK) ^ c1 ^ key0,
            high & _MASK,
            (low >> 32 & _MASK) ^ c3 ^ key1,
            low & _MASK,
        )
        key0 = key0 + _WEYL[0] & _MASK
        key1 = key1 + _WEYL[1] & _MASK
    return c0, c1, c2, c3


def uniform(words: Tensor) -> Tensor:
    """float32 in (0, 1): word * 2^-32 + 2^-33, both rounded to float32, and at most 1 - 2^-24."""
    return words.float().mul_(2.0**-32).add_(2.0**-33).clamp_(max=_LARGEST_BELOW_1)


def gumbel(seed: Tensor, position: Tensor, index: Tensor, of: int = OF_TOKENS) -> Tensor:
    """Standard Gumbel noise -log(-log(u)), [S, N] float32.

    seed: [S, 2] int32, the low and the high word; position: [S]; index: [S, N] or [1, N] ids of
    tokens or chunks. u is word `index % 4` of the counter (position, index / 4, of, 0) under the
    key `seed`.
    """
    low, high = (seed.long() & _MASK).split(1, dim=1)
    zero = torch.zeros_like(low)
    words = philox((low, high), (position.long()[:, None], index.long() >> 2, zero + of, zero))
    which = (index & 3).expand_as(words[0])
    chosen = torch.stack(words).gather(0, which[None])[0]
    return uniform(chosen).log_().neg_().log_().neg_()
