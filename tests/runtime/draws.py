"""Whether tokens are drawn from a distribution."""

from __future__ import annotations

import math

from torch import Tensor


def assert_drawn_from(probabilities: Tensor, tokens: Tensor) -> None:
    """The chi-square statistic of int `tokens` [N] lies within five of its deviations.

    probabilities: [V]; where they are 0 nothing may come, elsewhere five or more are expected.
    """
    found = tokens.long().bincount(minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    possible = expected > 0
    assert not found[~possible].any(), "a token of no probability came"
    assert expected[possible].min() >= 5, "too few draws to tell"
    statistic = ((found - expected)[possible].square() / expected[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom), statistic
