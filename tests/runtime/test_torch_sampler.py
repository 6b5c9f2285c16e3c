"""What may be sampled, how often, and that nothing but seed and position decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.arenas import Params
from tests.runtime.draws import assert_drawn_from
from zllm.runtime.ops import Sampled, SamplingStep
from zllm.runtime.philox import philox
from zllm.runtime.torch_sampler import sample

DRAWS = 4000


def draw(
    logits: torch.Tensor, rows: list[Params], positions: list[int], max_logprobs: int = -1
) -> Sampled:
    features = 0
    for row in rows:
        features |= row.features
    params = torch.from_numpy(np.stack([row.words() for row in rows]))
    lengths = torch.tensor(positions, dtype=torch.int32)
    return sample(logits, params, lengths, SamplingStep(features, max_logprobs))


def shares(logits: torch.Tensor, **options: float) -> torch.Tensor:
    """How often each token comes at as many positions of one row."""
    rows = [Params(temperature=options.pop("temperature", 1.0), seed=3, **options)] * DRAWS
    tokens = draw(logits.expand(DRAWS, -1), rows, list(range(DRAWS))).tokens
    return tokens.long().bincount(minlength=len(logits)) / DRAWS


def reference(logits: torch.Tensor, params: Params) -> torch.Tensor:
    """The distribution to draw from, written plainly in float64."""
    scaled = logits.double() / params.temperature
    keep = torch.ones(len(logits), dtype=torch.bool)
    probs = scaled.softmax(-1)
    if params.min_p:
        keep &= probs >= params.min_p * probs.max()
    if params.top_k:
        remaining = scaled.masked_fill(~keep, -torch.inf)
        keep &= remaining >= remaining.sort(descending=True).values[params.top_k - 1]
    if params.top_p < 1:
        probs = scaled.masked_fill(~keep, -torch.inf).softmax(-1)
        ordered, _ = probs.sort(descending=True)
        count = int((ordered.cumsum(-1) - ordered < params.top_p).sum())
        keep &= probs >= ordered[max(count, 1) - 1]
    return scaled.masked_fill(~keep, -torch.inf).softmax(-1)


CUTS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 5, "top_p": 0.7},
    {"min_p": 0.05, "top_p": 0.8, "temperature": 1.7},
    {"min_p": 0.05, "top_k": 4, "top_p": 0.9, "temperature": 1.3},
]


@pytest.mark.parametrize("options", CUTS)
@pytest.mark.parametrize("vocab", [30, 1000])
def test_tokens_come_as_often_as_the_cut_distribution_says(options, vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(vocab, generator=generator) * 2.5
    expected = reference(logits, Params(**{"temperature": 1.0, **options}))
    found = shares(logits, **options)
    assert not found[expected == 0].any(), "a token that was cut away came"
    # Five deviations of the count, and a few draws where the expected count is near zero.
    deviation = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((found - expected).abs() <= 5 * deviation + 3 / DRAWS).all()


def gumbel_noise(seed: int, position: int, of: int, count: int) -> torch.Tensor:
    """[count] float64, from the words that the sampler's noise is made of."""
    group = torch.arange(-(-count // 4))
    key = torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32)
    words = philox(key, (torch.tensor(position), group, torch.tensor(of), torch.tensor(0)))
    return -(-((torch.stack(words, 1).flatten()[:count].double() + 0.5) / 2**32).log()).log()


def best_and_lead(scores: torch.Tensor) -> tuple[int, float]:
    first, second = torch.cat([scores, scores.new_tensor([-torch.inf])]).topk(2).values
    return int(scores.argmax()), float(first - second)


@pytest.mark.parametrize("vocab", [1, 9, 64, 130, 1003])
def test_uncut_rows_draw_a_chunk_of_64_and_then_its_token(vocab):
    count, seed, temperature = 50, 5 + (7 << 32), 0.8
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    logits[:, 70:200] = -torch.inf  # a whole chunk among them
    row = Params(temperature=temperature, seed=seed)
    tokens = draw(logits, [row] * count, list(range(count))).tokens.tolist()
    compared = 0
    for position, token in enumerate(tokens):
        chunks = (logits[position].double() / temperature).split(64)
        weights = torch.stack([chunk.logsumexp(-1) for chunk in chunks])
        chunk, lead = best_and_lead(weights + gumbel_noise(seed, position, 1, len(chunks)))
        noise = gumbel_noise(seed, position, 0, vocab).split(64)[chunk]
        best, next_lead = best_and_lead(chunks[chunk] + noise)
        if min(lead, next_lead) > 1e-4:  # else float32 may round to another
            assert token == 64 * chunk + best
            compared += 1
    assert compared >= 0.9 * count


@pytest.mark.parametrize("options", [{"top_k": 203}, {"top_k": 5000}, {"top_p": 1.0}])
def test_options_that_cut_nothing_change_no_token(options):
    logits = torch.randn(40, 203, generator=torch.Generator().manual_seed(4))
    lengths = list(range(40))
    plain = draw(logits, [Params(temperature=1.2, seed=8)] * 40, lengths).tokens
    cut = draw(logits, [Params(temperature=1.2, seed=8, **options)] * 40, lengths).tokens
    assert torch.equal(plain, cut)


@pytest.mark.parametrize("vocab", [40, 203])
def test_uncut_tokens_are_distributed_as_they_should_be(vocab):
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1))
    logits[5] = logits[70:140] = -torch.inf
    params = Params(temperature=1.5, seed=3)
    count = 40_000
    tokens = draw(logits.expand(count, -1), [params] * count, list(range(count))).tokens
    assert_drawn_from(reference(logits, params), tokens)


def test_cuts_wider_than_the_first_candidates_are_exact():
    """A flat distribution: top-p keeps thousands of tokens, far beyond the first few hundred."""
    logits = torch.linspace(0, 0.5, 5000)
    expected = reference(logits, Params(temperature=1.0, top_p=0.5))
    count = 300
    rows = [Params(temperature=1.0, top_p=0.5, seed=3)] * count
    tokens = draw(logits.expand(count, -1), rows, list(range(count))).tokens.long()
    assert (expected[tokens] > 0).all()
    middle = int((expected.cumsum(0) < 0.5).sum())
    assert (tokens < middle).float().mean().item() == pytest.approx(0.5, abs=0.15)


def test_top_p_is_a_share_of_what_min_p_left_however_much_that_is():
    """More tokens pass min-p than are tried first, and those below it weigh two thirds of them."""
    logits = torch.cat([torch.linspace(0, -1, 300), torch.full((1600,), -2.5)])
    cuts = {"temperature": 1.0, "min_p": 0.1, "top_p": 0.5}
    count = 1000
    rows = [Params(seed=3, **cuts)] * count
    tokens = draw(logits.expand(count, -1), rows, list(range(count))).tokens
    assert_drawn_from(reference(logits, Params(**cuts)), tokens)


@pytest.mark.parametrize("cut", [{"top_k": 2}, {"top_p": 0.3}, {"min_p": 0.9}])
def test_tokens_as_likely_as_the_last_one_kept_are_kept_too(cut):
    logits = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0])
    found = shares(logits, **cut)
    assert found[[0, 3]].tolist() == [0, 0]
    assert (found[[1, 2, 4]] > 0.25).all()


def test_temperature_0_takes_the_most_likely_token_beside_random_rows():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rows = [Params(), Params(temperature=5.0, seed=1), Params()]
    tokens = draw(logits, rows, [4, 5, 6]).tokens
    assert tokens[[0, 2]].tolist() == logits.argmax(-1)[[0, 2]].tolist()


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-40])
@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_tiny_temperature_is_as_good_as_0(temperature, cut):
    logits = torch.randn(4, 500, generator=torch.Generator().manual_seed(2)) * 20
    tokens = draw(logits, [Params(temperature=temperature, seed=1, **cut)] * 4, [1, 2, 3, 4]).tokens
    assert tokens.tolist() == logits.argmax(-1).tolist()


params = st.builds(
    Params,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.1, 0.5, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3]),
    top_k=st.sampled_from([0, 1, 40, 299, 1000]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(params, min_size=1, max_size=6), st.integers(0, 1000), st.randoms())
def test_a_row_gets_the_same_token_alone_and_in_any_batch(rows, position, random):
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    logits = torch.randn(len(rows), 600, generator=generator) * random.choice([0.1, 1.0, 4.0])
    positions = [position + 10 * index for index in range(len(rows))]
    together = draw(logits, rows, positions).tokens.tolist()
    alone = [
        int(draw(logits[i : i + 1], rows[i : i + 1], positions[i : i + 1]).tokens[0])
        for i in range(len(rows))
    ]
    assert together == alone


def test_seed_and_position_both_change_the_draw():
    logits = torch.zeros(1, 10_000)
    tokens = {
        int(draw(logits, [Params(temperature=1.0, seed=seed)], [position]).tokens[0])
        for seed in (0, 1, 2**32, 2**63)
        for position in (0, 1, 2)
    }
    assert len(tokens) == 12


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_end_token_comes_before_min_len(temperature):
    logits = torch.zeros(3, 8)
    logits[:, 2] = 50.0
    logits[:, 5] = 40.0
    logits[:, 1] = 30.0
    row = Params(temperature=temperature, min_len=10, end_ids=(2, 5))
    sampled = draw(logits, [row] * 3, [8, 9, 10], max_logprobs=1)
    assert sampled.tokens.tolist() == [1, 1, 2]
    assert sampled.top_ids[:, 0].tolist() == [2, 2, 2], "logprobs are those before the ban"


def test_an_end_token_outside_the_vocabulary_bans_nothing():
    row = Params(min_len=9, end_ids=(1, 10**6))
    assert draw(torch.tensor([[1.0, 3.0, 2.0]]), [row], [3]).tokens.tolist() == [2]


@pytest.mark.parametrize("poison", [(7, torch.nan), (7, torch.inf), (slice(None), -torch.inf)])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9}])
def test_a_row_that_is_not_finite_gives_minus_1_alone(poison, options):
    logits = torch.randn(3, 400, generator=torch.Generator().manual_seed(1))
    clean = draw(logits, [Params(**options)] * 3, [1, 2, 3], max_logprobs=2).tokens.tolist()
    where, value = poison
    logits[1, where] = value
    found = draw(logits, [Params(**options)] * 3, [1, 2, 3], max_logprobs=2).tokens.tolist()
    assert found == [clean[0], -1, clean[2]]


def test_logprobs_are_of_the_unmodified_distribution():
    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(5)) * 3
    row = Params(temperature=2.5, top_k=10, seed=9)
    sampled = draw(logits, [row] * 4, [0, 1, 2, 3], max_logprobs=7)
    expected = logits.double().log_softmax(-1)
    for index, token in enumerate(sampled.tokens.tolist()):
        order = expected[index].argsort(descending=True)
        assert sampled.logprobs[index].item() == pytest.approx(
            expected[index, token].item(), abs=1e-5
        )
        assert order[int(sampled.ranks[index]) - 1] == token
        assert sampled.top_ids[index].tolist() == order[:7].tolist()
        assert sampled.top_logprobs[index].tolist() == pytest.approx(
            expected[index, order[:7]].tolist(), abs=1e-5
        )


def test_tokens_that_are_equally_likely_share_the_best_rank():
    sampled = draw(torch.tensor([[1.0, 3.0, 3.0]] * 2), [Params()] * 2, [0, 1], max_logprobs=0)
    assert sampled.ranks.tolist() == [1, 1]


def test_more_logprobs_than_there_are_tokens_are_those_of_all():
    sampled = draw(torch.tensor([[1.0, 3.0, 2.0]]), [Params()], [0], max_logprobs=20)
    assert sampled.top_ids.tolist() == [[1, 2, 0]]


def test_no_logprobs_where_nobody_wants_any():
    sampled = draw(torch.zeros(1, 5), [Params()], [0])
    assert sampled.logprobs is None
    assert sampled.top_ids is None
