"""Greedy decoding in float32 gives the tokens of Hugging Face transformers, and its logits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runtime.checkpoints import VOCAB, all_logits, greedy, make_hf_model, save
from tests.runtime.serving import Request, Server, random_prompts
from zllm.runtime import torch_batch, torch_runner
from zllm.runtime.loader import load_weights
from zllm.runtime.models.parameters import Parameter, Weights, fold_norms
from zllm.runtime.ops import Batch
from zllm.runtime.torch_ops import TorchOps

COUNT = 8
LONG = 24
"""So many that a sequence grows by blocks while it runs."""
TOLERANCE = 1e-4

VARIANTS: dict[str, dict[str, Any]] = {
    "gqa2": {},
    "gqa1-tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "gqa8": {
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0},
    },
    "gqa8-tied": {
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "head-dim-divides": {"head_dim": 12, "rope_parameters": {"rope_theta": 500.0}},
    "attention-bias": {"attention_bias": True},
    "large-epsilon": {"rms_norm_eps": 0.1},
}
PROMPTS = random_prompts(17, VOCAB, longest=70)
SHORT = [prompt[:15] for prompt in PROMPTS]
SHARED = PROMPTS[0][:1] + random_prompts(1, VOCAB, longest=1)[0] + list(range(40))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def make(variant: str) -> Path:
        folder = tmp_path_factory.mktemp(variant)
        return save(hf_model(variant), folder)

    return make


@cache
def hf_model(variant: str) -> Any:
    return make_hf_model(seed=len(variant), **VARIANTS[variant])


@cache
def expected(variant: str, prompt: tuple[int, ...], count: int) -> tuple[list[int], torch.Tensor]:
    """The tokens and the logits [count, V] that chose them."""
    tokens = greedy(hf_model(variant), list(prompt), count)
    logits = all_logits(hf_model(variant), [*prompt, *tokens])
    return tokens, logits[len(prompt) - 1 : -1]


def check(
    variant: str, server: Server, prompts: list[list[int]], *, spacing: int, count: int = COUNT
) -> None:
    """Serve the prompts, one arriving every `spacing` steps, and compare."""
    requests = [Request(p, count, index * spacing) for index, p in enumerate(prompts)]
    for prompt, answer in zip(prompts, server.serve(requests), strict=True):
        tokens, logits = expected(variant, tuple(prompt), count)
        assert answer.tokens == tokens
        torch.testing.assert_close(
            torch.stack(answer.logits), logits, atol=TOLERANCE, rtol=TOLERANCE
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_shape_of_model(variant: str, folder_of: Any) -> None:
    check(variant, Server(folder_of(variant), max_num_batched_tokens=48), PROMPTS, spacing=2)


@pytest.mark.parametrize("size", [1, 2, 5, 17])
def test_every_size_of_batch(size: int, folder_of: Any) -> None:
    check("gqa2", Server(folder_of("gqa2")), PROMPTS[:size], spacing=0)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("chunk", range(1, 65))
def test_every_size_of_chunk(chunk: int, caching: bool, folder_of: Any) -> None:
    """With caching, later prompts reuse the blocks of the earlier ones that they repeat."""
    server = Server(folder_of("gqa2"), max_num_batched_tokens=chunk, enable_prefix_caching=caching)
    prompts = [*PROMPTS[:4], SHARED, PROMPTS[1], [*SHARED, 5, 6], SHARED[:39]]
    check("gqa2", server, prompts, spacing=max(100 // chunk, 1))
    assert server.longest_step <= chunk
    hits = server.scheduler.stats()["hit_tokens"]
    assert hits > 0 if caching else hits == 0


@pytest.mark.parametrize("variant", ["gqa2", "attention-bias"])
@pytest.mark.parametrize("chunk", [7, 48, 512])
def test_the_last_layer_attends_for_samples_alone(
    chunk: int, variant: str, folder_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few tokens do not sample, of chunks that end within a prompt among others."""
    monkeypatch.setattr(torch_batch, "_WORTHWHILE", 1)
    attended: dict[int, set[bool]] = defaultdict(set)
    attention = TorchOps.attention

    def spy(self: TorchOps, q: torch.Tensor, batch: Batch, cache: Any, layer: int, **scale: Any):
        attended[layer].add(batch.all_sample)
        return attention(self, q, batch, cache, layer, **scale)

    monkeypatch.setattr(TorchOps, "attention", spy)
    server = Server(folder_of(variant), max_num_batched_tokens=chunk)
    check(variant, server, [*PROMPTS[:6], SHARED, [*SHARED, 5, 6]], spacing=1)
    assert attended == {0: {False}, 1: {False}, 2: {False, True}}


def test_a_step_is_worth_its_samples_plan_only_from_some_size_on(folder_of: Any) -> None:
    sizes: list[tuple[int, bool]] = []
    server = Server(folder_of("gqa2"), enable_prefix_caching=False)
    forward = server.runner.model.forward

    def spy(ops: Any, batch: Batch, *args: Any) -> Any:
        sizes.append((len(batch.tokens), batch.samples is not None))
        return forward(ops, batch, *args)

    server.runner.model.forward = spy
    for length in (128, 129):
        check("gqa2", server, [list(range(90)) + [3] * (length - 90)], spacing=0, count=1)
    assert sizes == [(128, False), (129, True)]


def test_gains_of_norms_may_stand_in_the_weights(
    folder_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they do on a GPU that applies norms without gains."""

    def folded(folder: Path, parameters: Iterable[Parameter], *where: Any) -> Weights:
        known = list(parameters)
        weights = load_weights(folder, known, *where)
        assert fold_norms(weights, known) == 2 * 3
        for name, weight in weights.items():
            ones = name.endswith(("input_norm", "post_norm"))
            assert ones == bool((weight == 1).all()), name
        return weights

    monkeypatch.setattr(torch_runner, "load_weights", folded)
    check("attention-bias", Server(folder_of("attention-bias")), PROMPTS[:4], spacing=1)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("chunk", [5, 48])
def test_so_few_blocks_that_sequences_must_give_way(
    chunk: int, caching: bool, folder_of: Any
) -> None:
    server = Server(
        folder_of("gqa2"),
        num_kv_blocks=4,
        max_num_batched_tokens=chunk,
        enable_prefix_caching=caching,
    )
    check("gqa2", server, SHORT, spacing=0, count=LONG)
    assert server.scheduler.stats()["preemptions"] > 0


def test_swapped_sequences_come_back_as_they_were(folder_of: Any) -> None:
    server = Server(
        folder_of("gqa2"), num_kv_blocks=4, max_num_batched_tokens=48, swap_space_gib=0.01
    )
    check("gqa2", server, SHORT, spacing=0, count=LONG)
    stats = server.scheduler.stats()
    assert stats["swaps_out"] > 0
    assert stats["swaps_in"] > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(dtype: str, folder_of: Any) -> None:
    """No test of equality: rounding moves the logits by what the type resolves."""
    server = Server(folder_of("gqa2"), dtype=dtype)
    tolerance = {"bfloat16": 0.15, "float16": 0.02}[dtype]
    for prompt, answer in zip(PROMPTS, server.serve([Request(p, 1) for p in PROMPTS]), strict=True):
        logits = expected("gqa2", tuple(prompt), 1)[1][0]
        error = (answer.logits[0].float() - logits).abs().max() / logits.abs().max()
        assert error < tolerance
