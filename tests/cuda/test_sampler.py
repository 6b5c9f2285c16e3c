"""The sampling kernels against the CPU's sampler, token for token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.runtime.draws import assert_drawn_from
from zllm.cuda.launcher import KernelLibrary
from zllm.cuda.linear import ScaledRows, SkinnyLinear
from zllm.cuda.sampler import Bias, HostTokens, SampledRows, Sampler
from zllm.errors import KernelError
from zllm.native import arena
from zllm.runtime import torch_sampler
from zllm.runtime.ops import SamplingStep

pytestmark = pytest.mark.gpu
VOCAB = 151936
EVERYTHING = arena.S_RANDOM | arena.S_TOP_K | arena.S_TOP_P | arena.S_MIN_P
FLAT, PEAKED = 1.0, 6.0
"""Standard deviations of random logits: top-p leaves most of the vocabulary, or a handful."""


def _params(rows: int, **values: float) -> Tensor:
    """[rows + 1, PARAM_WORDS], every row with the same parameters and a seed of its own."""
    floats = torch.zeros(rows + 1, arena.PARAM_WORDS)
    floats[:rows, arena.P_TOP_P] = 1.0
    floats[:rows, arena.P_REPETITION] = 1.0
    words = floats.view(torch.int32)
    words[:rows, arena.P_SEED_LOW] = torch.randint(-(2**31), 2**31 - 1, (rows,)).int()
    words[:rows, arena.P_SEED_HIGH] = torch.randint(-(2**31), 2**31 - 1, (rows,)).int()
    for name, value in values.items():
        word = getattr(arena, f"P_{name.upper()}")
        table = floats if isinstance(value, float) else words
        table[:rows, word] = value
    return words


class _Rows:
    """`count` sampled rows in a shuffled order, whose lengths are their tokens' positions + 1."""

    def __init__(self, count: int, params: Tensor) -> None:
        order = torch.randperm(count).int()
        positions = torch.randint(0, 5000, (2 * count,)).int()
        sample_tokens = (torch.arange(count) * 2 + 1).int()
        self.params = params[order.long()]
        self.lengths = positions[sample_tokens.long()] + 1
        self.order = order.long()
        self.device = SampledRows(
            order.cuda(), sample_tokens.cuda(), positions.cuda(), params.cuda()
        )
        self.tokens = torch.full((count,), -7, dtype=torch.int32, device="cuda")
        self.last_token = torch.full((len(params),), -7, dtype=torch.int32, device="cuda")

    def sample(self, sampler: Sampler, logits: Tensor, counts: Tensor | None = None) -> Tensor:
        sampler.sample(logits.cuda(), self.device, self.tokens, self.last_token, counts)
        assert torch.equal(self.last_token.cpu()[self.order], self.tokens.cpu())
        return self.tokens.cpu()

    def expected(self, logits: Tensor, features: int = EVERYTHING) -> Tensor:
        step = SamplingStep(features, -1)
        return torch_sampler.sample(logits, self.params, self.lengths, step).tokens


PARAMETERS = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 0.8},
    "top-k": {"temperature": 1.0, "top_k": 50},
    "top-1": {"temperature": 1.0, "top_k": 1},
    "large top-k": {"temperature": 1.0, "top_k": 20_000},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
    "tiny top-p": {"temperature": 1.0, "top_p": 1e-6},
    "min-p": {"temperature": 1.0, "min_p": 0.05},
    "top-k and top-p": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "all": {"temperature": 1.3, "top_k": 200, "top_p": 0.8, "min_p": 0.01},
    "min-p and top-p": {"temperature": 1.3, "top_p": 0.8, "min_p": 0.01},
}


def _logits(rows: int, vocab: int, spread: float, dtype: torch.dtype) -> Tensor:
    return (torch.randn(rows, vocab) * spread).to(dtype)


@pytest.mark.parametrize("spread", [FLAT, PEAKED])
@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)
def test_tokens_are_the_references(
    kernels: KernelLibrary, parameters: dict[str, float], spread: float
) -> None:
    torch.manual_seed(1)
    for rows, vocab, dtype in (
        (1, VOCAB, torch.bfloat16),
        (8, VOCAB, torch.bfloat16),
        (5, 50257, torch.float32),
        (7, 32000, torch.float16),
        (40, 1000, torch.float32),
    ):
        sampler = Sampler(kernels, arena.MACROS, dtype, vocab, rows)
        batch = _Rows(rows, _params(rows, **parameters))
        logits = _logits(rows, vocab, spread, dtype)
        assert torch.equal(batch.sample(sampler, logits), batch.expected(logits)), (rows, vocab)


def test_mixed_rows_small(kernels: KernelLibrary) -> None:
    """Each row follows its own parameters: greedy, plain and filtered rows side by side."""
    torch.manual_seed(2)
    rows, vocab = 12, 3000
    params = _params(rows, temperature=0.9)
    floats = params.view(torch.float32)
    floats[0:4, arena.P_TEMPERATURE] = 0.0
    params[4:8, arena.P_TOP_K] = torch.tensor([1, 5, 40, 2999]).int()
    floats[6:10, arena.P_TOP_P] = torch.tensor([0.5, 0.9, 0.99, 0.2])
    floats[9:11, arena.P_MIN_P] = torch.tensor([0.1, 0.5])
    sampler = Sampler(kernels, arena.MACROS, torch.float32, vocab, rows)
    batch = _Rows(rows, params)
    logits = _logits(rows, vocab, 2.0, torch.float32)
    assert torch.equal(batch.sample(sampler, logits), batch.expected(logits))


@pytest.mark.parametrize("parameters", [{}, {"top_k": 100, "top_p": 0.9}], ids=["plain", "cut"])
def test_a_row_samples_the_same_alone_and_in_any_batch(
    kernels: KernelLibrary, parameters: dict[str, float]
) -> None:
    torch.manual_seed(3)
    rows = 64
    params = _params(rows, temperature=1.0, **parameters)
    batch = _Rows(rows, params)
    logits = _logits(rows, VOCAB, FLAT, torch.bfloat16).cuda()
    together = batch.sample(Sampler(kernels, arena.MACROS, torch.bfloat16, VOCAB, rows), logits)
    alone = Sampler(kernels, arena.MACROS, torch.bfloat16, VOCAB, 1)
    for s in range(0, rows, 9):
        device = batch.device
        one = SampledRows(
            device.sample_rows[s : s + 1],
            device.sample_tokens[s : s + 1],
            device.positions,
            device.params,
        )
        token = torch.zeros(1, dtype=torch.int32, device="cuda")
        alone.sample(logits[s : s + 1], one, token, batch.last_token)
        assert token.item() == together[s]


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [
        (1, torch.float32),
        (130, torch.bfloat16),
        (1003, torch.float32),
        (1003, torch.bfloat16),
        (2056, torch.float16),
    ],
)
def test_uncut_rows_of_any_vocabulary_small(
    kernels: KernelLibrary, vocab: int, dtype: torch.dtype
) -> None:
    """Chunks that end early or hold nothing but -inf, and vectors that no load is aligned to."""
    torch.manual_seed(9)
    rows = 40
    logits = _logits(rows, vocab, FLAT, dtype)
    logits[: rows // 2, 1 : 2 * vocab // 3] = -torch.inf
    batch = _Rows(rows, _params(rows, temperature=1.0))
    sampler = Sampler(kernels, arena.MACROS, dtype, vocab, rows)
    assert torch.equal(batch.sample(sampler, logits), batch.expected(logits))


@pytest.mark.parametrize("likely", [True, False])
@pytest.mark.parametrize(
    ("vocab", "rows", "dtype"),
    [(1028, 8, torch.float32), (2056, 8, torch.bfloat16), (50257, 70, torch.float16)],
)
def test_a_vocabularys_last_few_tokens_are_drawn_when_they_are_likely_small(
    kernels: KernelLibrary, vocab: int, rows: int, dtype: torch.dtype, likely: bool
) -> None:
    """A chunk that ends before most of its lanes' tokens has its say. Both ways, so that whatever
    an unwritten score holds gives one of them away. Rows decide where slices begin."""
    torch.manual_seed(13)
    logits = _logits(rows, vocab, FLAT, torch.float32)
    last = vocab // 64 * 64
    logits[:, last:] += 20.0 if likely else -20.0
    batch = _Rows(rows, _params(rows, temperature=1.0))
    tokens = batch.sample(Sampler(kernels, arena.MACROS, dtype, vocab, rows), logits.to(dtype))
    assert torch.equal(tokens, batch.expected(logits.to(dtype)))
    assert bool((tokens >= last).all() if likely else (tokens < last).all())


def test_uncut_tokens_are_distributed_as_they_should_be(kernels: KernelLibrary) -> None:
    torch.manual_seed(10)
    rows, vocab, temperature = 20_000, 203, 1.5
    logits = torch.randn(vocab)
    logits[5] = logits[70:140] = -torch.inf
    batch = _Rows(rows, _params(rows, temperature=temperature))
    sampler = Sampler(kernels, arena.MACROS, torch.float32, vocab, rows)
    tokens = batch.sample(sampler, logits.repeat(rows, 1))
    assert_drawn_from((logits.double() / temperature).softmax(-1), tokens)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-40])
@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_tiny_temperature_is_as_good_as_0_small(
    kernels: KernelLibrary, temperature: float, cut: dict[str, float]
) -> None:
    torch.manual_seed(11)
    rows, vocab = 4, 500
    logits = _logits(rows, vocab, 20.0, torch.float32)
    batch = _Rows(rows, _params(rows, temperature=temperature, **cut))
    sampler = Sampler(kernels, arena.MACROS, torch.float32, vocab, rows)
    assert torch.equal(batch.sample(sampler, logits), logits.argmax(-1).int())


def test_ties_are_allowed_together_and_greedy_takes_the_lowest_small(
    kernels: KernelLibrary,
) -> None:
    torch.manual_seed(4)
    rows, vocab = 200, 2000
    tied = torch.tensor([7, 300, 301, 1999])
    logits = torch.full((rows, vocab), -1.0)
    logits[:, tied] = 3.0
    sampler = Sampler(kernels, arena.MACROS, torch.float32, vocab, rows)
    batch = _Rows(rows, _params(rows, temperature=1.0, top_k=2))
    assert set(batch.sample(sampler, logits).tolist()) == set(tied.tolist())
    greedy = _Rows(rows, _params(rows, temperature=0.0))
    assert greedy.sample(sampler, logits).unique().tolist() == [7]


def test_rows_that_are_not_finite_give_minus_one_and_leave_the_others_small(
    kernels: KernelLibrary,
) -> None:
    torch.manual_seed(5)
    rows, vocab = 8, 2000
    for parameters in (
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 9},
    ):
        logits = _logits(rows, vocab, FLAT, torch.float32)
        logits[1, 77] = torch.nan
        logits[2, 1999] = torch.inf
        logits[3] = -torch.inf
        logits[4, :1000] = -torch.inf  # banned tokens are no fault
        batch = _Rows(rows, _params(rows, **parameters))
        sampler = Sampler(kernels, arena.MACROS, torch.float32, vocab, rows)
        tokens = batch.sample(sampler, logits)
        assert tokens[1:4].tolist() == [-1, -1, -1]
        assert tokens[4] >= 1000
        finite = torch.tensor([0, 5, 6, 7])
        assert torch.equal(tokens[finite], batch.expected(logits)[finite])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_apply_penalties_bias_and_minimum_length_small(
    kernels: KernelLibrary, dtype: torch.dtype
) -> None:
    torch.manual_seed(6)
    rows, vocab, limit = 6, 1500, 8
    params = _params(rows, presence=0.5, frequency=0.25, repetition=1.3, num_end_ids=2)
    params[:rows, arena.P_END_IDS : arena.P_END_IDS + 2] = torch.tensor([3, 1499]).int()
    params[:3, arena.P_MIN_LEN] = 6000
    params.view(torch.float32)[5, arena.P_REPETITION] = 1.0
    params.view(torch.float32)[5, arena.P_PRESENCE : arena.P_FREQUENCY + 1] = 0.0
    sampler = Sampler(kernels, arena.MACROS, dtype, vocab, rows)
    batch = _Rows(rows, params)

    counts = torch.full((rows + 1, vocab), 77, dtype=torch.int16, device="cuda")
    prompts = torch.randint(vocab, (rows, 300))
    answers = torch.randint(vocab // 10, (rows, 400))
    for row in range(rows):
        tokens = torch.cat([prompts[row], answers[row]]).int().cuda()
        sampler.count_tokens(counts, row, tokens, 300)
    ids = torch.stack([torch.randperm(vocab)[:limit] for _ in range(rows + 1)]).int()
    values = torch.randn(rows + 1, limit) * 3
    lengths = torch.randint(limit + 1, (rows + 1,)).int()
    bias = Bias(ids.cuda(), values.cuda(), lengths.cuda())

    logits = _logits(rows, vocab, 2.0, dtype)
    out = torch.full((rows, vocab), torch.nan, dtype=dtype, device="cuda")
    device_logits = logits.cuda()
    sampler.edit(device_logits, batch.device, counts=counts, bias=bias, out=out)
    assert torch.equal(device_logits.cpu(), logits)

    expected = logits.double()
    for s, row in enumerate(batch.order.tolist()):
        x = expected[s]
        floats = params.view(torch.float32)[row]
        sampled = torch.bincount(answers[row], minlength=vocab)
        seen = (sampled > 0) | (torch.bincount(prompts[row], minlength=vocab) > 0)
        repetition = floats[arena.P_REPETITION].item()
        x[seen] = torch.where(x > 0, x / repetition, x * repetition)[seen]
        x -= floats[arena.P_PRESENCE] * (sampled > 0) + floats[arena.P_FREQUENCY] * sampled
        chosen = ids[row, : lengths[row]].long()
        x[chosen] += values[row, : lengths[row]]
        if row < 3:
            x[[3, 1499]] = -torch.inf
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=tolerance)
    in_place = sampler.edit(device_logits, batch.device, counts=counts, bias=bias)
    assert in_place is device_logits
    assert torch.equal(in_place, out)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("rows", "vocab"),
    [
        pytest.param(9, None, id="small"),
        (16, VOCAB),
        (64, VOCAB),
        (100, VOCAB),
        (30, 128_257),
    ],
)
def test_a_product_leaves_what_the_scan_would_find(
    kernels: KernelLibrary, rows: int, vocab: int | None, scaled: bool
) -> None:
    """Of logits that a product makes, for greedy, plain and filtered rows side by side."""
    products, dtype, size = SkinnyLinear(kernels), torch.bfloat16, 256
    if vocab is None:  # a chunk for each multiprocessor, the last one not whole
        vocab = kernels.num_sms * 64 - (16 if scaled else 5)
    if not products.leaves_chunks(rows, vocab, size, dtype):
        pytest.skip("its tiles have no whole chunks")
    torch.manual_seed(15)
    params = _params(rows, temperature=0.7)
    params.view(torch.float32)[: rows // 3, arena.P_TEMPERATURE] = 0.0
    params.view(torch.float32)[rows // 3 : rows // 2, arena.P_TOP_P] = 0.9
    params[rows // 2 : rows // 2 + 2, arena.P_TOP_K] = 40
    batch = _Rows(rows, params)
    sampler = Sampler(kernels, arena.MACROS, dtype, vocab, rows)
    x = torch.randn(rows, size, device="cuda").to(dtype)
    weight = (torch.randn(vocab, size, device="cuda") * 0.2).to(dtype)
    weight[77] = torch.nan if rows == 16 else 0
    chunks = sampler.chunks(batch.device)
    chunks.chunks.fill_(torch.nan)
    if scaled:
        if not products.supports_scaled(rows, vocab, size, dtype):
            pytest.skip("norms are kernels of their own here")
        squares = x.float().square().sum(1)[None]
        left = ScaledRows(x, squares)
        logits = products.linear_of_scaled(left, weight, eps=1e-6, chunks=chunks)
    else:
        logits = products.linear(x, weight, chunks=chunks)
    count = -(-vocab // 64)
    tops, weights = chunks.chunks[:, :count].cpu().unbind(-1)
    padded = torch.full((rows, count * 64), -torch.inf)
    padded[:, :vocab] = logits.float().cpu()
    each = padded.view(rows, count, 64)
    assert torch.equal(tops.nan_to_num(7.0), each.amax(-1).nan_to_num(7.0))
    drawn = batch.params.view(torch.float32)[:, arena.P_TEMPERATURE] > 0
    expected = ((each - each.amax(-1, keepdim=True)) / 0.7).exp().sum(-1)
    torch.testing.assert_close(weights[drawn], expected[drawn], rtol=1e-4, atol=0, equal_nan=True)

    sampler.sample(logits, batch.device, batch.tokens, batch.last_token, scanned=True)
    tokens = batch.tokens.cpu()
    assert torch.equal(tokens, batch.sample(sampler, logits))
    assert bool((tokens == -1).all() if rows == 16 else (tokens >= 0).all())


def test_sampled_tokens_are_counted_small(kernels: KernelLibrary) -> None:
    torch.manual_seed(7)
    rows, vocab = 5, 1000
    sampler = Sampler(kernels, arena.MACROS, torch.float32, vocab, rows)
    batch = _Rows(rows, _params(rows, temperature=0.0))
    counts = torch.zeros(rows + 1, vocab, dtype=torch.int16, device="cuda")
    logits = _logits(rows, vocab, FLAT, torch.float32)
    for _ in range(3):
        tokens = batch.sample(sampler, logits, counts)
    assert torch.equal(counts.cpu()[batch.order, tokens.long()], torch.full((rows,), 3).short())
    assert counts.sum() == 3 * rows


@pytest.mark.parametrize(
    ("rows", "vocab", "dtype", "top"),
    [
        pytest.param(3, 1000, torch.float32, 5, id="small"),
        (4, VOCAB, torch.bfloat16, 20),
        (2, 50257, torch.float32, 0),
        (2, 130, torch.float32, 130),
    ],
)
def test_logprobs_ranks_and_the_most_likely(
    kernels: KernelLibrary, rows: int, vocab: int, dtype: torch.dtype, top: int
) -> None:
    torch.manual_seed(8)
    logits = _logits(rows, vocab, 3.0, dtype)
    chosen = torch.randint(vocab, (rows,)).int()
    chosen[0] = logits[0].argmax()
    sampler = Sampler(kernels, arena.MACROS, dtype, vocab, rows)
    out = sampler.allocate_logprobs(rows, top)
    sampler.logprobs(logits.cuda(), chosen.cuda(), out)
    values, ranks, top_ids, top_values = (t.cpu() for t in out)
    expected = logits.double().log_softmax(-1)
    at = expected.gather(1, chosen.long()[:, None])
    torch.testing.assert_close(values.double(), at[:, 0], rtol=0, atol=2e-5)
    assert torch.equal(ranks, ((expected > at).sum(-1) + 1).int())
    # Best first, the lower id first among equals.
    order = logits.double().sort(dim=-1, descending=True, stable=True).indices[:, :top]
    assert torch.equal(top_ids, order.int())
    torch.testing.assert_close(top_values.double(), expected.gather(1, order), rtol=0, atol=2e-5)


def test_a_failed_row_has_no_logprob_small(kernels: KernelLibrary) -> None:
    sampler = Sampler(kernels, arena.MACROS, torch.float32, 1000, 1)
    chosen = torch.tensor([-1], dtype=torch.int32, device="cuda")
    out = sampler.allocate_logprobs(1, 1)
    sampler.logprobs(torch.randn(1, 1000, device="cuda"), chosen, out)
    assert out.values.isnan().all()
    assert out.ranks.item() == 0


def test_even_and_odd_steps_have_a_place_each_on_the_host_small(kernels: KernelLibrary) -> None:
    torch.manual_seed(14)
    rows, vocab = 5, 1000
    sampler = Sampler(kernels, arena.MACROS, torch.float32, vocab, rows)
    batch = _Rows(rows, _params(rows))
    step = torch.zeros(1, dtype=torch.int32, device="cuda")
    host = HostTokens(torch.full((2, 8), -7, dtype=torch.int32, pin_memory=True), step)
    for number in (6, 7, 8):
        step.fill_(number)
        logits = _logits(rows, vocab, FLAT, torch.float32)
        sampler.sample(logits.cuda(), batch.device, batch.tokens, batch.last_token, host=host)
        torch.cuda.synchronize()
        assert torch.equal(host.tokens[number % 2, :rows], batch.tokens.cpu())
        assert torch.equal(batch.tokens.cpu(), logits.argmax(-1).int())
        assert bool((host.tokens[:, rows:] == -7).all())


def test_arguments_that_do_not_fit_are_named(kernels: KernelLibrary) -> None:
    sampler = Sampler(kernels, arena.MACROS, torch.float32, 1000, 4)
    batch = _Rows(4, _params(4))
    for match, logits in (
        ("logits is torch.bfloat16", torch.zeros(4, 1000).bfloat16()),
        (r"logits has shape \[4, 999\]", torch.zeros(4, 999)),
        ("logits has 5 rows: this sampler was made for 4", torch.zeros(5, 1000)),
        (r"sample_rows has shape \[4\]", torch.zeros(3, 1000)),
    ):
        tokens = torch.zeros(len(logits), dtype=torch.int32, device="cuda")
        with pytest.raises(KernelError, match=match):
            sampler.sample(logits.cuda(), batch.device, tokens, batch.last_token)
    logits, tokens = torch.zeros(4, 1000, device="cuda"), torch.zeros(4).int().cuda()
    step = torch.zeros(1, dtype=torch.int32, device="cuda")
    for match, pinned in (
        (r"host.tokens is torch.int32 \[2, 4\], pinned: False", torch.zeros(2, 4).int()),
        ("host.tokens holds 3 tokens of a step: 4", torch.zeros(2, 3).int().pin_memory()),
    ):
        host = HostTokens(pinned, step)
        with pytest.raises(KernelError, match=match):
            sampler.sample(logits, batch.device, tokens, batch.last_token, host=host)
    with pytest.raises(KernelError, match="vocab is 300000"):
        Sampler(kernels, arena.MACROS, torch.float32, 300_000, 4)
