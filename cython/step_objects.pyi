"""A step as Python sees it: its plan when it begins, its events when it has ended."""

import numpy as np
import numpy.typing as npt

class Plan:
    """One planned step. Its arena holds all that the device needs; these are the counts."""

    step: int
    num_rows: int
    num_tokens: int
    num_decodes: int
    num_sampled: int
    num_words: int
    """Words of the arena in use."""
    num_copies: int
    num_swap_out: int
    num_swap_in: int
    max_logprobs: int
    features: int

class Events:
    """What a commit found out: parallel arrays, one entry a token or a finish."""

    request_ids: npt.NDArray[np.int64]
    sequences: npt.NDArray[np.int32]
    """Index within the request (0 unless num_sequences > 1)."""
    tokens: npt.NDArray[np.int32]
    """-1 where the entry carries a finish alone."""
    finishes: npt.NDArray[np.uint8]
    """FinishReason; 0 while the sequence goes on."""
    rows: npt.NDArray[np.int32]
    """Index of the token's row among the step's rows, as in `commit`; -1 where token is -1."""
    started: list[tuple[int, int, float, float]]
    """(request id, cached tokens, seconds queued, seconds from its first step's plan to its first
    token) of requests whose first token is here."""
