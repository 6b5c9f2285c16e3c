"""Chooses tokens from logits, in torch: the reference of the CUDA sampler.

Semantics: end tokens are banned while the row is shorter than its min_len; the rest is divided by
the temperature; min-p, then top-k, then top-p cut what remains, each on the distribution that the
one before left. Every cut is a threshold: tokens as likely as the last one kept are kept too, so
the result does not depend on how a sort breaks ties. One token is drawn by the Gumbel-max trick:
the argmax of logit / temperature + Gumbel noise, keyed by the row's seed and position.

Where nothing is cut, the trick goes top-down: the largest of logit / temperature + noise over a
chunk of tokens is distributed as the chunk's log-sum-exp + one noise. So that picks the chunk, and
the tokens' own noise, which is independent, picks among its tokens: noise for a chunk in place of
noise for each of its tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from zllm.native import arena
from zllm.runtime.ops import Sampled, SamplingStep
from zllm.runtime.philox import OF_CHUNKS, gumbel

_CUTS = arena.S_TOP_K | arena.S_TOP_P | arena.S_MIN_P
_AT_ONCE = 2**22
"""Logits that are drawn from at once: it bounds the memory that the noise takes."""
_CHUNK = 64
"""Tokens that share a noise where nothing is cut; the kernels' kChunk."""
_CANDIDATES = 256
"""The most likely tokens that the cuts are first tried on: nearly always enough."""


def sample(logits: Tensor, params: Tensor, lengths: Tensor, step: SamplingStep) -> Sampled:
    """[S, V] logits -> one token a row.

    params: [S, PARAM_WORDS] int32, the rows' sampling parameters as the arena packs them.
    lengths: [S] int32, tokens of each row so far, which is the position of the sampled token.
    """
    logits = logits.float()
    # NaN and infinity come through a maximum; a single -inf is a token that cannot be chosen.
    finite = logits.amax(dim=-1).isfinite()
    allowed = logits
    if step.features & arena.S_MIN_TOKENS:
        allowed = _ban_end_tokens(logits, params, lengths)
    tokens = allowed.argmax(dim=-1)
    if step.features & arena.S_RANDOM:
        temperature = _floats(params, arena.P_TEMPERATURE)
        # Rows that are not finite are of no use, and would never settle.
        random = torch.nonzero((temperature > 0) & finite)[:, 0]
        if len(random):
            # Relative to the best, so that no temperature, however small, makes infinity.
            relative = allowed[random] - allowed[random].amax(dim=-1, keepdim=True)
            scaled = relative / temperature[random, None]
            tokens[random] = _draw(scaled, params[random], lengths[random], step.features)
    tokens = tokens.int()
    marked = torch.where(finite, tokens, -1)
    if step.max_logprobs < 0:
        return Sampled(marked)
    return _with_logprobs(marked, tokens.long(), logits, step.max_logprobs)


def _floats(params: Tensor, word: int) -> Tensor:
    return params[:, word].contiguous().view(torch.float32)


def _ban_end_tokens(logits: Tensor, params: Tensor, lengths: Tensor) -> Tensor:
    ids = params[:, arena.P_END_IDS : arena.P_END_IDS + arena.MAX_END_IDS].long()
    listed = torch.arange(arena.MAX_END_IDS, device=ids.device) < params[:, [arena.P_NUM_END_IDS]]
    too_short = (lengths < params[:, arena.P_MIN_LEN])[:, None]
    known = (ids >= 0) & (ids < logits.shape[1])
    row, index = torch.nonzero(listed & too_short & known, as_tuple=True)
    return logits.index_put((row, ids[row, index]), logits.new_tensor(-torch.inf))


def _draw(scaled: Tensor, params: Tensor, lengths: Tensor, features: int) -> Tensor:
    """[n, V] logits over their temperature -> [n] tokens, a few rows at a time."""
    tokens = torch.empty(len(scaled), dtype=torch.int64, device=scaled.device)
    cuts = torch.zeros_like(tokens, dtype=torch.bool)
    if features & _CUTS:
        top_k = params[:, arena.P_TOP_K]
        cuts = (top_k > 0) & (top_k < scaled.shape[1])
        cuts |= _floats(params, arena.P_TOP_P) < 1.0
        cuts |= _floats(params, arena.P_MIN_P) > 0.0
    at_once = max(1, _AT_ONCE // scaled.shape[1])
    for which, draw in ((~cuts, _draw_from_all), (cuts, _draw_from_most_likely)):
        for rows in torch.nonzero(which)[:, 0].split(at_once):
            if len(rows):
                tokens[rows] = draw(scaled[rows], params[rows], lengths[rows])
    return tokens


def _draw_from_all(scaled: Tensor, params: Tensor, lengths: Tensor) -> Tensor:
    """[n, V] -> [n]: a chunk of the vocabulary, then a token of it."""
    seed, device = _seed(params), scaled.device
    padded = pad(scaled, (0, -scaled.shape[1] % _CHUNK), value=-torch.inf)
    weights = padded.unflatten(1, (-1, _CHUNK)).logsumexp(dim=-1)
    chunks = torch.arange(weights.shape[1], device=device)[None]
    chunk = (weights + gumbel(seed, lengths, chunks, OF_CHUNKS)).argmax(dim=-1, keepdim=True)
    ids = chunk * _CHUNK + torch.arange(_CHUNK, device=device)
    token = (padded.gather(1, ids) + gumbel(seed, lengths, ids)).argmax(dim=-1, keepdim=True)
    return torch.gather(ids, 1, token)[:, 0]


def _draw_from_most_likely(scaled: Tensor, params: Tensor, lengths: Tensor) -> Tensor:
    vocab_size = scaled.shape[1]
    width = max(_CANDIDATES, int(params[:, arena.P_TOP_K].max()) + 1)
    tokens, settled = _draw_among(scaled, params, lengths, min(width, vocab_size))
    if width < vocab_size and not bool(settled.all()):
        wide = torch.nonzero(~settled)[:, 0]
        tokens[wide], _ = _draw_among(scaled[wide], params[wide], lengths[wide], vocab_size)
    return tokens


def _seed(params: Tensor) -> Tensor:
    return params[:, arena.P_SEED_LOW : arena.P_SEED_HIGH + 1]


def _draw_among(
    scaled: Tensor, params: Tensor, lengths: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """Cut and draw among the `width` most likely tokens.

    Returns the tokens and whether each row's cut lies inside: else the row needs more of them.
    """
    values, ids = scaled.topk(width, dim=-1)
    top_k = params[:, arena.P_TOP_K].long()
    top_p = _floats(params, arena.P_TOP_P)[:, None]
    min_p = _floats(params, arena.P_MIN_P)[:, None]
    # min_p 0 gives -inf: no cut.
    least = values[:, :1] + min_p.log()
    at_least = values >= least
    # The k-th of what min-p left; k beyond the width, and 0, cut nothing.
    k = torch.where((top_k > 0) & (top_k < width), top_k, width)
    kth = values.gather(1, k[:, None] - 1)
    cut = torch.where((top_k > 0)[:, None], torch.maximum(least, kth), least)
    kept = at_least & (values >= cut)
    inside = ~kept[:, -1]
    # What top-p is a share of: all that is kept, the tokens outside the candidates included.
    total = values.masked_fill(~kept, -torch.inf).logsumexp(dim=-1)
    total = torch.where(inside, total, scaled.logsumexp(dim=-1))[:, None]
    shares = (values - total).exp().masked_fill(~kept, 0.0)
    before = shares.cumsum(dim=-1) - shares
    nucleus = kept & ((before < top_p) | (top_p >= 1.0))
    nucleus[:, 0] = True
    last = nucleus.long().cumsum(dim=-1).argmax(dim=-1, keepdim=True)
    final = torch.where(top_p < 1.0, torch.maximum(cut, values.gather(1, last)), cut)
    kept = values >= final
    # A row that cut by min-p or top-k but not inside had a total that counts too much.
    cuts_before = (top_k > 0) | (min_p[:, 0] > 0.0)
    settled = ~kept[:, -1] & (inside | ~cuts_before)
    noise = gumbel(_seed(params), lengths, ids)
    best = (values + noise).masked_fill(~kept, -torch.inf).argmax(dim=-1, keepdim=True)
    return ids.gather(1, best)[:, 0], settled


def _with_logprobs(marked: Tensor, tokens: Tensor, logits: Tensor, top: int) -> Sampled:
    """Under the unmodified distribution, whatever the sampling parameters did to it."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, tokens[:, None])
    ranks = (logprobs > chosen).sum(dim=-1).add_(1).int()
    top_logprobs, top_ids = logprobs.topk(min(top, logits.shape[1]), dim=-1)
    return Sampled(marked, chosen[:, 0], ranks, top_ids.int(), top_logprobs)
