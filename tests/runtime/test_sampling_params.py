"""Bad values are refused with the field's path in the contract."""

from __future__ import annotations

import math

import numpy as np
import pytest

from zllm.errors import InvalidRequest
from zllm.runtime.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("sampling.temperature", {"temperature": math.nan}),
        ("sampling.temperature", {"temperature": math.inf}),
        ("sampling.temperature", {"temperature": -0.1}),
        ("sampling.temperature", {"temperature": 100.5}),
        ("sampling.temperature", {"temperature": 1e39}),
        ("sampling.temperature", {"temperature": "hot"}),
        ("sampling.temperature", {"temperature": True}),
        ("sampling.top_p", {"top_p": 0.0}),
        ("sampling.top_p", {"top_p": 2.0}),
        ("sampling.top_p", {"top_p": math.nan}),
        ("sampling.min_p", {"min_p": -0.5}),
        ("sampling.min_p", {"min_p": 1.5}),
        ("sampling.top_k", {"top_k": -2}),
        ("sampling.top_k", {"top_k": 1.5}),
        ("sampling.seed", {"seed": -1}),
        ("sampling.seed", {"seed": 2**64}),
        ("sampling.seed", {"seed": np.int64(-1)}),
        ("sampling.seed", {"seed": np.float32(1.0)}),
        ("sampling.temperature", {"temperature": np.float32("nan")}),
        ("stopping.max_tokens", {"max_tokens": 0}),
        ("stopping.max_tokens", {"max_tokens": -5}),
        ("stopping.min_tokens", {"min_tokens": -1}),
        ("stopping.min_tokens", {"min_tokens": 9, "max_tokens": 8}),
        ("stopping.stop_strings[1]", {"stop": ["end", ""]}),
        ("stopping.stop_strings", {"stop": ["x"] * 10_000}),
        ("stopping.stop_strings", {"stop": 5}),
        ("stopping.stop_token_ids", {"stop_token_ids": 5}),
        ("stopping.stop_token_ids[0]", {"stop_token_ids": [-1]}),
        ("stopping.stop_token_ids", {"stop_token_ids": range(1025)}),
        ("output.logprobs", {"logprobs": -1}),
        ("output.logprobs", {"logprobs": 21}),
    ],
)
def test_a_bad_value_is_refused_with_its_path_and_value(field, options):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**options)
    assert caught.value.field == field
    assert caught.value.reason


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 100.0},
        {"min_p": 0.0},
        {"min_p": 1.0},
        {"min_tokens": 8, "max_tokens": 8},
        {"stop": ["x"] * 64},
        {"stop_token_ids": range(1024)},
        {"logprobs": 0},
        {"logprobs": 20},
    ],
)
def test_the_bounds_themselves_are_good_values(options):
    params = SamplingParams(**options)
    for name, value in options.items():
        kept = getattr(params, name)
        assert kept == (tuple(value) if isinstance(kept, tuple) else value)


def test_good_values_are_kept():
    params = SamplingParams(
        temperature=0, top_p=1.0, top_k=-1, seed=2**64 - 1, stop="end", stop_token_ids=[3]
    )
    assert params.top_k == 0
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3,)
    assert params.min_p is None, "left to the model's generation_config.json"


def test_numbers_of_numpy_are_numbers():
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int64(5),
        seed=np.uint64(2**64 - 1),
        max_tokens=np.int32(7),
        stop_token_ids=np.array([3, 4]),
    )
    plain = SamplingParams(
        temperature=0.5, top_k=5, seed=2**64 - 1, max_tokens=7, stop_token_ids=[3, 4]
    )
    assert repr(params) == repr(plain)


def test_none_stops_nothing():
    params = SamplingParams(stop=None, stop_token_ids=None)
    assert (params.stop, params.stop_token_ids) == ((), ())


def test_left_out_values_ask_for_16_tokens_as_vllm_does():
    assert SamplingParams().max_tokens == 16
