"""Errors as callers of several processes meet them."""

from __future__ import annotations

import pickle

import pytest

from zllm.errors import InvalidRequest, Overloaded, Unavailable, UnknownModel, ZllmError


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("sampling.top_p", "2 is too much"),
        UnknownModel("model", "nobody"),
        Overloaded("the queue is full", 3.0, cause="queue_full"),
        Unavailable("loading", 2.0),
    ],
)
def test_an_error_goes_from_one_process_to_another_whole(error: ZllmError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
