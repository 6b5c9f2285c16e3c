"""One step at a time, from arenas packed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.runtime.arenas import Params, Row, Step
from tests.runtime.checkpoints import all_logits, greedy, make_hf_model, save
from zllm.errors import ConfigError
from zllm.runtime.config import EngineConfig
from zllm.runtime.torch_runner import TorchRunner

PROMPT = list(range(20, 53))
"""Two whole blocks and one token."""


@pytest.fixture(scope="module")
def hf_model():
    return make_hf_model(seed=3)


@pytest.fixture(scope="module")
def folder(hf_model, tmp_path_factory):
    return save(hf_model, tmp_path_factory.mktemp("model"))


@pytest.fixture
def runner(folder):
    return TorchRunner(
        EngineConfig(
            model=folder, device="cpu", num_kv_blocks=32, max_num_seqs=4, swap_space_gib=0.001
        )
    )


def prefill(row: int, blocks: list[int], *, tokens: list[int] = PROMPT, **options) -> Step:
    table = [(row, index, block) for index, block in enumerate(blocks)]
    return Step([Row(row, tokens)], table, [Params(row)], **options)


def decode(row: int, kv_len: int, **options) -> Step:
    return Step([Row(row, [0], kv_len, on_device=True)], **options)


def test_a_decode_reads_the_token_that_the_last_step_left_on_the_device(runner, hf_model):
    tokens = [int(runner.run(prefill(2, [5, 3, 7]).pack()).tokens[0])]
    for kv_len in range(len(PROMPT), len(PROMPT) + 5):
        tokens.append(int(runner.run(decode(2, kv_len).pack()).tokens[0]))
    assert tokens == greedy(hf_model, PROMPT, 6)


def test_rows_that_do_not_sample_hold_zero_and_the_others_keep_their_place(runner, hf_model):
    step = Step(
        [Row(0, PROMPT[:20], sample=False), Row(1, PROMPT), Row(2, PROMPT[:5], sample=False)],
        [(0, 0, 1), (0, 1, 2), (1, 0, 3), (1, 1, 4), (1, 2, 5), (2, 0, 6)],
        [Params(0), Params(1), Params(2)],
        max_logprobs=3,
    )
    result = runner.run(step.pack())
    logits = all_logits(hf_model, PROMPT)[-1]
    best = logits.log_softmax(-1).topk(3)
    assert result.tokens.tolist() == [0, int(logits.argmax()), 0]
    found = result.token_logprobs(1, 3)
    assert found.rank == 1
    assert found.logprob == pytest.approx(best.values[0].item(), abs=1e-4)
    assert found.top_ids == best.indices.tolist()
    assert found.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-4)
    assert len(result.token_logprobs(1, 0).top_ids) == 0


def test_a_copied_block_serves_a_second_row(runner, hf_model):
    runner.run(prefill(0, [1, 2, 3]).pack())
    last = PROMPT[32:]
    step = Step(
        [Row(1, last, kv_len=32)],
        [(1, 0, 1), (1, 1, 9), (1, 2, 10)],
        [Params(1)],
        copies=[(2, 9)],
    )
    assert runner.run(step.pack()).tokens.tolist() == greedy(hf_model, PROMPT, 1)


def test_a_swapped_row_goes_on_from_other_blocks(runner, hf_model):
    first = int(runner.run(prefill(0, [1, 2, 3]).pack()).tokens[0])
    swap = [(1, 0), (2, 1), (3, 2)]
    # Another row takes over the blocks in the step that swaps them out.
    runner.run(prefill(1, [1, 2, 3], tokens=PROMPT[::-1], swap_out=swap).pack())
    step = Step(
        [Row(0, [first], len(PROMPT))],
        [(0, 0, 6), (0, 1, 5), (0, 2, 4)],
        swap_in=[(0, 6), (1, 5), (2, 4)],
    )
    assert [first, int(runner.run(step.pack()).tokens[0])] == greedy(hf_model, PROMPT, 2)


def test_a_row_that_is_not_finite_fails_alone_and_poisons_nobody(runner, hf_model):
    runner.run(prefill(0, [1, 2, 3]).pack())
    expected = greedy(hf_model, PROMPT, 3)
    runner.cache.keys[0][2] = torch.nan
    runner.run(prefill(1, [4, 5, 6]).pack())
    both = Step(
        [
            Row(0, [0], len(PROMPT), on_device=True),
            Row(1, [0], len(PROMPT), on_device=True),
        ]
    )
    assert runner.run(both.pack()).tokens.tolist() == [-1, expected[1]]
    # The step after it may be under way already: it must run, and may give anything but harm.
    both = Step(
        [
            Row(0, [0], len(PROMPT) + 1, on_device=True),
            Row(1, [0], len(PROMPT) + 1, on_device=True),
        ]
    )
    assert runner.run(both.pack()).tokens[1] == expected[2]
    # The blocks' next owner fills the last one in part, and masks the rest.
    short = PROMPT[:20]
    tokens = runner.run(prefill(2, [3, 2], tokens=short).pack()).tokens.tolist()
    assert tokens == greedy(hf_model, short, 1)


def test_a_decode_does_not_see_the_failing_block_that_its_table_still_names(runner, hf_model):
    short = PROMPT[:10]
    first = int(runner.run(prefill(1, [4], tokens=short).pack()).tokens[0])
    runner.run(prefill(0, [1, 2, 3]).pack())
    runner.cache.keys[0][2] = torch.nan
    stale = [(1, 1, 2), (1, 2, 3)]  # what is left of an earlier owner of the row
    step = Step(
        [
            Row(0, [0], len(PROMPT), on_device=True),
            Row(1, [0], len(short), on_device=True),
        ],
        stale,
    )
    tokens = runner.run(step.pack()).tokens.tolist()
    assert tokens[0] == -1
    assert [first, tokens[1]] == greedy(hf_model, short, 2)


def test_a_chunk_that_is_not_finite_fails_before_its_blocks_are_shared(runner, hf_model):
    runner.run(prefill(0, [1, 2, 3]).pack())
    runner.cache.keys[0][1] = torch.nan
    step = Step(
        [Row(0, PROMPT[16:32], 16, sample=False), Row(1, PROMPT[:16], sample=False)],
        [(1, 0, 4), (1, 1, 5), (1, 2, 6)],
        [Params(1)],
    )
    assert runner.run(step.pack()).tokens.tolist() == [-1, 0]
    assert all(runner.cache.by_block()[block].isfinite().all() for block in (1, 2, 3))
    step = Step([Row(1, PROMPT[16:], 16)])
    assert runner.run(step.pack()).tokens.tolist() == greedy(hf_model, PROMPT, 1)


def test_a_chunk_fails_though_the_table_of_another_failing_row_names_its_block(runner):
    runner.run(prefill(0, [1, 2, 3]).pack())
    runner.run(prefill(1, [4, 5, 6]).pack())
    runner.cache.keys[0][1] = torch.nan
    runner.cache.keys[0][4] = torch.nan
    stale = [(0, 3, 5)]  # what is left of an earlier owner of the row
    step = Step(
        [
            Row(0, [0], len(PROMPT), on_device=True),
            Row(1, PROMPT[16:32], 16, sample=False),
        ],
        stale,
    )
    assert runner.run(step.pack()).tokens.tolist() == [-1, -1]


def test_decodes_of_very_different_lengths_run_in_one_step(runner, hf_model):
    long = [token % 97 for token in range(200)]
    runner.run(prefill(0, list(range(1, 14)), tokens=long).pack())
    runner.run(prefill(1, [20], tokens=[7]).pack())
    runner.run(prefill(2, [21], tokens=[9, 8]).pack())
    step = Step(
        [
            Row(1, [0], 1, on_device=True),
            Row(0, [0], 200, on_device=True),
            Row(2, [0], 2, on_device=True),
        ]
    )
    tokens = runner.run(step.pack()).tokens.tolist()
    assert tokens == [greedy(hf_model, prompt, 2)[1] for prompt in ([7], long, [9, 8])]


def test_a_long_chunk_attends_in_pieces(runner, hf_model):
    tokens = [(token * 7) % 97 for token in range(500)]
    blocks = [(0, index, index + 1) for index in range(32)]
    first = Step([Row(0, tokens[:3], sample=False)], blocks, [Params(0)])
    runner.run(first.pack())
    result = runner.run(Step([Row(0, tokens[3:], kv_len=3)]).pack())
    assert result.tokens.tolist() == greedy(hf_model, tokens, 1)


def test_the_pool_fits_the_memory_and_the_report_says_so(folder):
    runner = TorchRunner(EngineConfig(model=folder, device="cpu", max_num_seqs=2))
    assert runner.max_model_len == 512
    assert runner.num_kv_blocks == 2 * 512 // 16 + 1
    assert any("2.0 requests of full length" in line for line in runner.report)


def test_a_fixed_pool_has_that_many_blocks_for_requests(folder):
    runner = TorchRunner(EngineConfig(model=folder, device="cpu", num_kv_blocks=7))
    assert runner.num_kv_blocks == 8, "block 0 belongs to nobody"


def test_a_context_beyond_the_models_is_refused(folder):
    with pytest.raises(ConfigError, match="max_model_len is 4096"):
        TorchRunner(EngineConfig(model=folder, device="cpu", max_model_len=4096))


@pytest.mark.parametrize("length", [1, 0, -1, True, 2.0])
def test_a_context_without_room_for_a_prompt_and_an_output_is_refused(folder, length):
    wrong = rf"max_model_len is {length}: .* at least 2, .* or left out"
    with pytest.raises(ConfigError, match=wrong):
        EngineConfig(model=folder, max_model_len=length)
    assert EngineConfig(model=folder, max_model_len=2).max_model_len == 2


def test_dummy_weights_are_the_same_for_the_same_seed(folder):
    def run(seed: int) -> np.ndarray:
        config = EngineConfig(
            model=folder, device="cpu", num_kv_blocks=8, load_format="dummy", seed=seed
        )
        step = prefill(0, [1, 2, 3], max_logprobs=0)
        return TorchRunner(config).run(step.pack()).logprobs

    assert run(1) == run(1)
    assert run(1) != run(2)
