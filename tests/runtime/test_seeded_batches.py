"""The same seed gives the same tokens alone and in any batch, preempted or not."""

from __future__ import annotations

import pytest

from tests.runtime.checkpoints import VOCAB, make_hf_model, save
from tests.runtime.serving import Request, Server, random_prompts

OPTIONS = [
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.8, "top_p": 0.9, "seed": 2**64 - 1},
    {"temperature": 1.5, "top_k": 10, "seed": 3},
    {"temperature": 1.0, "min_p": 0.05, "seed": 4},
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 1},
]
REQUESTS = [
    Request(prompt, 20, arrival=2 * index, options=options)
    for index, (prompt, options) in enumerate(
        zip(random_prompts(len(OPTIONS), VOCAB, longest=40, seed=8), OPTIONS, strict=True)
    )
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Small weights make flat distributions, from which a wrong draw would show.
    return save(make_hf_model(initializer_range=0.1), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(folder):
    server = Server(folder, enable_prefix_caching=False)
    return [server.serve([request])[0].tokens for request in REQUESTS]


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 7}, {"num_kv_blocks": 6}])
def test_a_batch_changes_nothing(folder, alone, settings):
    answers = Server(folder, **settings).serve(REQUESTS)
    assert [answer.tokens for answer in answers] == alone


def test_another_seed_gives_other_tokens(folder, alone):
    request = Request(REQUESTS[0].prompt, 20, options={"temperature": 1.0, "seed": 99})
    assert Server(folder).serve([request])[0].tokens != alone[0]
