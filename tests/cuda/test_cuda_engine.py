"""The whole engine on the GPU: transformers' tokens, the CPU's samples, nothing left behind."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.runtime.checkpoints import VOCAB, all_logits, greedy, make_hf_model, save
from tests.runtime.serving import Request, Server, random_prompts
from zllm import LLM, SamplingParams
from zllm.cuda.decoder import ResidentDecoder
from zllm.cuda.linear_many import ManyRows
from zllm.runtime.config import EngineConfig
from zllm.runtime.cuda_runner import CudaRunner
from zllm.runtime.engine import Engine
from zllm.runtime.messages import AddRequest, FinishReason, Sampling, Stopping
from zllm.runtime.tiny_tasks import held_out_tasks

pytestmark = pytest.mark.gpu

LOGITS_TOLERANCE = {"float32": 2e-4, "bfloat16": 0.1}
"""Of the largest logit, against transformers in float32."""
HEAD = 64
"""The smallest head that the kernels know."""
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa2": {"head_dim": HEAD, "hidden_size": 64},
    "gqa1-tied": {"head_dim": HEAD, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "gqa8-head128": {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 1},
}
PROMPTS = random_prompts(17, VOCAB, longest=150, seed=1)


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A transformers model on the CPU, and the folder of its checkpoint."""
    settings = {"hidden_size": 64, "intermediate_size": 128, **VARIANTS[request.param]}
    hf_model = make_hf_model(seed=3, **settings)
    return hf_model, save(hf_model, tmp_path_factory.mktemp(request.param))


def requests(count: int) -> list[Request]:
    return [Request(prompt, count, index) for index, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("dtype", LOGITS_TOLERANCE)
def test_logits_are_those_of_transformers(model: Any, dtype: str) -> None:
    hf_model, folder = model
    server = Server(
        folder, device="cuda", dtype=dtype, enforce_eager=True, max_num_batched_tokens=48
    )
    for prompt, answer in zip(PROMPTS, server.serve(requests(6)), strict=True):
        tokens = answer.tokens
        expected = all_logits(hf_model, [*prompt, *tokens])[len(prompt) - 1 : -1]
        error = (torch.stack(answer.logits).float() - expected).abs().max()
        assert error / expected.abs().max() < LOGITS_TOLERANCE[dtype]


def test_few_sequences_go_through_the_resident_decoder(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_model, folder = model
    launched = Counter[int]()
    run = ResidentDecoder.run

    def spy(self: ResidentDecoder, tokens: torch.Tensor, *args: Any, **options: Any) -> Any:
        launched[tokens.numel()] += 1
        return run(self, tokens, *args, **options)

    monkeypatch.setattr(ResidentDecoder, "run", spy)
    asked = [Request(prompt, 12, 3 * index) for index, prompt in enumerate(PROMPTS[:5])]
    _check_logits(hf_model, folder, asked)
    assert set(launched) >= {1, 2, 3}


def test_few_sequences_of_a_wide_model(tmp_path: Path) -> None:
    """Whose products are the tiles' with any number of rows, and leave norms to each other."""
    sizes = {"hidden_size": 2048, "intermediate_size": 4096, "head_dim": 128}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    hf_model = make_hf_model(seed=3, **sizes, **heads)
    asked = [Request(prompt, 6, 2 * index) for index, prompt in enumerate(PROMPTS[:6])]
    _check_logits(hf_model, save(hf_model, tmp_path), asked)


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "steps", "keys_alone"),
    [
        # The second of three steps has the end of one prompt and the beginning of the other.
        ((2500, 1700), 2048, [2048, 2048], 0),
        # One has them all, and so many that of the last layer only the keys and values are made.
        ((2600, 2500, 1, 300), 8192, [5401], 1),
        # The first one ends within a prompt; the second has a decode, and the rest of it.
        ((4400, 4700), 5000, [5000, 4101], 1),
    ],
)
def test_long_prompts_go_through_the_products_of_many_rows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lengths: tuple[int, ...],
    max_tokens: int,
    steps: list[int],
    keys_alone: int,
) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("these products are for Hopper")
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "head_dim": 128}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    hf_model = make_hf_model(seed=3, max_position_embeddings=8192, **sizes, **heads)
    launched = Counter[tuple[int, bool]]()
    qkv = ManyRows.qkv

    def spy(
        self: ManyRows, x: torch.Tensor, weight: torch.Tensor, rope: Any, **options: Any
    ) -> Any:
        assert options["norm"] is not None, "the norm before it has no kernel of its own"
        launched[len(x), rope.num_heads > 0] += 1
        return qkv(self, x, weight, rope, **options)

    monkeypatch.setattr(ManyRows, "qkv", spy)
    draw = random.Random(5)
    prompts = [[draw.randrange(VOCAB) for _ in range(length)] for length in lengths]
    asked = [Request(prompt, 5, 0) for prompt in prompts]
    limits = {"max_num_batched_tokens": max_tokens, "num_kv_blocks": 600}
    server = _server(save(hf_model, tmp_path), **limits)
    launched.clear()  # of the steps that measure
    _serve_and_check_logits(server, hf_model, asked)
    layers = hf_model.config.num_hidden_layers
    expected = [
        (tokens, layer < layers - keys_alone) for tokens in steps for layer in range(layers)
    ]
    assert launched == Counter(expected)


def _check_logits(hf_model: Any, folder: Path, asked: list[Request], **options: Any) -> None:
    """Served in bfloat16, by steps of any size."""
    _serve_and_check_logits(_server(folder, **options), hf_model, asked)


def _server(folder: Path, **options: Any) -> Server:
    return Server(folder, device="cuda", dtype="bfloat16", enforce_eager=True, **options)


def _serve_and_check_logits(server: Server, hf_model: Any, asked: list[Request]) -> None:
    for request, answer in zip(asked, server.serve(asked), strict=True):
        tokens = answer.tokens
        expected = all_logits(hf_model, [*request.prompt, *tokens])[len(request.prompt) - 1 : -1]
        error = (torch.stack(answer.logits).float() - expected).abs().max()
        assert error / expected.abs().max() < LOGITS_TOLERANCE["bfloat16"]


@pytest.mark.parametrize("blocks", [400, 14])
@pytest.mark.parametrize("eager", [False, True])
def test_greedy_tokens_in_float32_are_those_of_transformers(
    model: Any, eager: bool, blocks: int
) -> None:
    """With 14 blocks sequences must give way to each other."""
    hf_model, folder = model
    settings = {"enforce_eager": eager, "num_kv_blocks": blocks, "max_num_batched_tokens": 64}
    server = Server(folder, device="cuda", dtype="float32", **settings)
    for prompt, answer in zip(PROMPTS, server.serve(requests(40)), strict=True):
        assert answer.tokens == greedy(hf_model, prompt, 40)
    assert (server.scheduler.stats()["preemptions"] > 0) == (blocks == 14)


def test_samples_in_float32_are_those_of_the_cpu(model: Any) -> None:
    """Both draw the same counter-based noise; only rounding near a tie may part them."""
    _, folder = model
    options = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 8},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.05, "top_k": 40},
    ]
    asked = [
        Request(prompt, 12, 0, {**options[index % 4], "seed": 2**63 + index})
        for index, prompt in enumerate(PROMPTS)
    ]
    ours = Server(folder, device="cuda", dtype="float32").serve(asked)
    reference = Server(folder, device="cpu", dtype="float32").serve(asked)
    same = sum(a.tokens == b.tokens for a, b in zip(ours, reference, strict=True))
    assert same >= len(asked) - 1


def test_logprobs_and_minimum_lengths(model: Any) -> None:
    _, folder = model
    options = {"temperature": 0.0, "num_logprobs": 5, "min_tokens": 6, "eos_token_ids": (3, 4, 5)}
    asked = [Request(prompt, 10, 0, options) for prompt in PROMPTS]
    ours = Server(folder, device="cuda", dtype="float32").serve(asked)
    reference = Server(folder, device="cpu", dtype="float32").serve(asked)
    for got, expected in zip(ours, reference, strict=True):
        assert got.tokens == expected.tokens
        assert not set(got.tokens[:6]) & {3, 4, 5}
        for one, other in zip(got.logprobs, expected.logprobs, strict=True):
            assert one[1:3] == other[1:3]
            assert one[0] == pytest.approx(other[0], abs=1e-3)
            assert one[3] == pytest.approx(other[3], abs=1e-3)


QUESTIONS = [
    pytest.param({}, id="roomy"),
    pytest.param({"num_kv_blocks": 60}, id="preemption"),
    pytest.param({"num_kv_blocks": 60, "swap_space_gib": 0.2}, id="swap"),
    pytest.param({"kv_cache_dtype": "fp8_e4m3"}, id="fp8-kv"),
    pytest.param({"max_num_batched_tokens": 64, "max_num_seqs": 48}, id="short-chunks"),
    pytest.param({"dtype": "float16"}, id="fp16"),
]


@pytest.mark.parametrize("options", QUESTIONS)
def test_the_embedded_model_answers_at_least_99_of_100(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overlap, graphs and prefix reuse are on. Swapping never pays for so small a model: here it
    is taken to cost nothing."""
    monkeypatch.setattr(CudaRunner, "_swap_cost", lambda *_: 0.0)
    tasks = held_out_tasks(2000)
    llm = LLM(device="cuda", **options)
    answers = llm.chat(
        [[{"role": "user", "content": task.question}] for task in tasks],
        SamplingParams(temperature=0.0, max_tokens=450),
    )
    right = sum(a.outputs[0].text == t.answer for a, t in zip(answers, tasks, strict=True))
    stats = llm.engine.scheduler.stats()
    llm.engine.scheduler.check()
    llm.close()
    assert right >= 1980
    assert stats["hit_tokens"] > 0
    if "num_kv_blocks" in options:
        assert stats["preemptions"] > 0
    if "swap_space_gib" in options:
        assert stats["swaps_in"] > 0


def test_random_aborts_under_load_leave_nothing_behind(model: Any) -> None:
    _, folder = model
    engine = Engine(
        EngineConfig(model=folder, device="cuda", num_kv_blocks=80, max_num_batched_tokens=128)
    )
    chance = random.Random(5)
    free = engine.load().kv_blocks_free
    ended: Counter[int] = Counter()
    for number in range(1, 401):
        prompt = np.array(chance.choices(range(VOCAB), k=chance.randint(1, 120)), np.int32)
        engine.add(
            AddRequest(
                request_id=number,
                prompt=prompt.tobytes(),
                sampling=Sampling(temperature=1.0, seed=number),
                stopping=Stopping(max_tokens=chance.randint(1, 60)),
            )
        )
        for _ in range(chance.randint(0, 3)):
            _count(engine, ended)
        if chance.random() < 0.6:
            engine.abort([chance.randint(1, number)])
    while engine.has_work():
        _count(engine, ended)
    engine.scheduler.check()
    assert sum(ended.values()) == 400
    assert ended[FinishReason.ABORTED] > 20
    assert engine.load().kv_blocks_free == free
    engine.close()


def _count(engine: Engine, ended: Counter[int]) -> None:
    output = engine.step()
    if output is not None:
        assert not output.refused
        ended.update(finish for finish in output.finishes if finish)


def test_a_step_that_ran_out_of_memory_runs_again(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_model, folder = model
    server = Server(folder, device="cuda", dtype="float32")
    run, calls = server.runner._run, []

    def short_of_memory(*args: Any, **options: Any) -> None:
        calls.append(args)
        if len(calls) % 3 == 1:
            raise torch.OutOfMemoryError("CUDA out of memory, by the test")
        run(*args, **options)

    monkeypatch.setattr(server.runner, "_run", short_of_memory)
    for prompt, answer in zip(PROMPTS, server.serve(requests(10)), strict=True):
        assert answer.tokens == greedy(hf_model, prompt, 10)


def test_memory_that_is_gone_fails_the_step_and_not_the_engine(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_model, folder = model
    # The prompt takes two chunks: the first one samples nothing, and must fail all the same.
    server = Server(folder, device="cuda", dtype="float32", max_num_batched_tokens=64)

    def no_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory, by the test")

    with monkeypatch.context() as patch:
        patch.setattr(server.runner, "_run", no_memory)
        (answer,) = server.serve([Request(list(range(60)) * 2, 10)])
    assert answer.finish == FinishReason.ERROR
    (answer,) = server.serve(requests(10)[:1])
    assert answer.tokens == greedy(hf_model, PROMPTS[0], 10)


def test_a_poisoned_request_fails_alone(tmp_path: Path) -> None:
    """Token 5's embedding is NaN: a prompt with it has no finite logits, in any batch."""
    hf_model = make_hf_model(head_dim=HEAD, hidden_size=64, intermediate_size=96)
    with torch.no_grad():
        hf_model.model.embed_tokens.weight[5] = float("nan")
    folder = save(hf_model, tmp_path)
    clean = [[token for token in prompt if token != 5] or [1] for prompt in PROMPTS]
    poisoned = [[1, 2, 5, 3], [5] * 40]
    server = Server(folder, device="cuda", dtype="float32", num_kv_blocks=40)
    # The clean ones come last, so that they get blocks that held NaN.
    asked = [Request(p, 20, 0) for p in poisoned] + [
        Request(p, 20, 3 + index) for index, p in enumerate(clean)
    ]
    failed, answers = server.serve(asked)[:2], server.serve(asked)[2:]
    assert [answer.finish for answer in failed] == [FinishReason.ERROR] * 2
    for prompt, answer in zip(clean, answers, strict=True):
        tokens = greedy(hf_model, prompt, 20)
        until = tokens.index(5) + 1 if 5 in tokens else 20
        assert answer.tokens[:until] == tokens[:until]


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e4m3"])
@pytest.mark.parametrize("eager", [False, True])
def test_what_a_failed_request_leaves_in_its_blocks_reaches_nobody(
    tmp_path: Path, kv_cache_dtype: str, eager: bool
) -> None:
    hf_model = make_hf_model(head_dim=HEAD, hidden_size=64, intermediate_size=96)
    with torch.no_grad():
        hf_model.model.embed_tokens.weight[5] = float("nan")
    server = Server(
        save(hf_model, tmp_path),
        device="cuda",
        dtype="bfloat16",
        kv_cache_dtype=kv_cache_dtype,
        enforce_eager=eager,
        enable_prefix_caching=False,
        num_kv_blocks=40,
    )
    clean = [
        Request([token for token in prompt if token != 5] or [1], 20, index)
        for index, prompt in enumerate(PROMPTS)
    ]
    before = [answer.tokens for answer in server.serve(clean)]
    # Long enough to have had every block.
    poisoned = server.serve([Request([5] * 100, 20, index) for index in range(8)])
    assert {answer.finish for answer in poisoned} == {FinishReason.ERROR}
    assert [answer.tokens for answer in server.serve(clean)] == before
