"""The generator gives the published numbers, so that any device may reproduce them."""

from __future__ import annotations

import math

import pytest
import torch

from zllm.runtime.philox import OF_CHUNKS, OF_TOKENS, gumbel, philox, uniform

ANSWERS = [
    # The known answers of Random123 for philox4x32-10: counter, key, result.
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), ANSWERS)
def test_known_answers(counter, key, expected):
    words = philox(
        (torch.tensor([key[0]]), torch.tensor([key[1]])),
        tuple(torch.tensor([word]) for word in counter),
    )
    assert tuple(int(word) for word in words) == expected


def test_uniform_numbers_lie_strictly_between_0_and_1():
    u = uniform(torch.tensor([0, 1, 2**31, 2**32 - 1]))
    assert u.dtype == torch.float32
    assert u.tolist() == [2.0**-33, 1.5 * 2.0**-32, 0.5, 1.0 - 2.0**-24]


def test_noise_of_some_ids_is_that_of_the_whole_vocabulary():
    seed = torch.tensor([[1, -2], [3, 4]], dtype=torch.int32)
    position = torch.tensor([5, 70_000], dtype=torch.int32)
    index = torch.tensor([[0, 5, 17], [18, 2, 3]])
    whole = gumbel(seed, position, torch.arange(19)[None])
    assert whole.shape == (2, 19)
    assert torch.equal(gumbel(seed, position, index), whole.gather(1, index))


@pytest.mark.parametrize("of", [OF_TOKENS, OF_CHUNKS])
def test_noise_is_word_id_mod_4_of_the_counter_position_id_div_4_and_kind(of):
    words = philox(
        (torch.tensor([7]), torch.tensor([9])),
        tuple(torch.tensor([word]) for word in (11, 3, of, 0)),
    )
    seed = torch.tensor([[7, 9]], dtype=torch.int32)
    noise = gumbel(seed, torch.tensor([11]), torch.arange(12, 16)[None], of)[0]
    expected = [-math.log(-math.log((int(w) + 0.5) / 2**32)) for w in words]
    assert noise.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("of", [OF_TOKENS, OF_CHUNKS])
def test_noise_has_the_gumbel_distributions_mean_and_deviation(of):
    seed = torch.tensor([[1, 2]], dtype=torch.int32)
    noise = gumbel(seed, torch.tensor([0]), torch.arange(200_000)[None], of)
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.02)


def test_noises_of_tokens_and_of_chunks_are_independent():
    seed, position = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([0])
    index = torch.arange(200_000)[None]
    both = torch.cat([gumbel(seed, position, index, of) for of in (OF_TOKENS, OF_CHUNKS)])
    assert both.corrcoef()[0, 1].item() == pytest.approx(0, abs=0.01)
