"""The embedded model: small, of a known shape, and right about what it was trained on."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from safetensors import safe_open

from zllm.runtime.chat_template import ChatTemplate, load_chat_template
from zllm.runtime.config import EngineConfig
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.runtime.engine import Engine
from zllm.runtime.messages import AddRequest, FinishReason, Sampling, Stopping
from zllm.runtime.tiny_tasks import KINDS, held_out_tasks
from zllm.runtime.tokenizer import Tokenizer, load_tokenizer

MAX_BYTES = 4_000_000


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    template = load_chat_template(EMBEDDED_MODEL)
    assert template is not None
    return template


def answers(prompts: list[list[int]], eos: tuple[int, ...]) -> list[list[int]]:
    """Greedy tokens for each prompt, all of them in one engine at once."""
    engine = Engine(
        EngineConfig(model=EMBEDDED_MODEL, device="cpu", num_kv_blocks=4096, max_num_seqs=256)
    )
    for index, prompt in enumerate(prompts):
        engine.add(
            AddRequest(
                request_id=index,
                prompt=np.asarray(prompt, np.int32).tobytes(),
                sampling=Sampling(temperature=0.0),
                stopping=Stopping(max_tokens=450, eos_token_ids=eos),
            )
        )
    made: list[list[int]] = [[] for _ in prompts]
    ended: Counter[int] = Counter()
    while engine.has_work():
        output = engine.step()
        if output is None:
            continue
        assert not output.refused
        for request, token, finish in zip(
            np.frombuffer(output.request_ids, np.int64),
            np.frombuffer(output.tokens, np.int32),
            np.frombuffer(output.finishes, np.uint8),
            strict=True,
        ):
            if token >= 0 and token not in eos:
                made[request].append(int(token))
            if finish:
                ended[FinishReason(finish)] += 1
    engine.close()
    assert ended.total() == len(prompts)
    return made


def test_the_weights_fit_in_four_megabytes() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED_MODEL.glob("*.safetensors")) <= MAX_BYTES


def test_the_weights_are_bfloat16_and_cover_every_token(tokenizer: Tokenizer) -> None:
    with safe_open(EMBEDDED_MODEL / "model.safetensors", "numpy") as file:
        types = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        rows, _ = file.get_slice("model.embed_tokens.weight").get_shape()
    config = json.loads((EMBEDDED_MODEL / "config.json").read_text())
    assert types == {"BF16"}
    assert config["vocab_size"] == rows >= tokenizer.vocab_size


def test_words_to_spell_are_one_token_a_letter(tokenizer: Tokenizer) -> None:
    for word in ("planet", "what", "PLANET", "january"):
        ids = tokenizer.encode(f'"{word}"')
        assert [tokenizer.token_bytes(i).decode() for i in ids] == ['"', *word, '"']


def test_template_words_are_one_token(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("What comes after")) == 3
    assert len(tokenizer.encode("Count from")) == 2


def test_2000_held_out_questions_are_answered(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    tasks = held_out_tasks(2000)
    prompts = [
        tokenizer.encode(
            template.render([{"role": "user", "content": task.question}]), add_special_tokens=False
        )
        for task in tasks
    ]
    eos = tuple(tokenizer.encode("<|im_end|><|endoftext|>"))
    made = [tokenizer.decode(ids) for ids in answers(prompts, eos)]

    wrong = [(t, text) for t, text in zip(tasks, made, strict=True) if text != t.answer]
    assert {task.kind for task in tasks} == set(KINDS)
    assert len({task.question for task in tasks}) == 2000
    assert len(wrong) <= 20, [(task.question, text) for task, text in wrong[:10]]


def test_a_later_turn_is_answered_as_the_first(
    tokenizer: Tokenizer, template: ChatTemplate
) -> None:
    tasks = held_out_tasks(100, seed=1)
    history = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is 8 + 5?"},
        {"role": "assistant", "content": "8 + 5 = 13"},
        {"role": "user", "content": "Count from 3 to 9."},
        {"role": "assistant", "content": "3, 4, 5, 6, 7, 8, 9"},
    ]
    prompts = [
        tokenizer.encode(
            template.render([*history, {"role": "user", "content": task.question}]),
            add_special_tokens=False,
        )
        for task in tasks
    ]
    eos = tuple(tokenizer.encode("<|im_end|><|endoftext|>"))
    made = [tokenizer.decode(ids) for ids in answers(prompts, eos)]
    assert sum(text != task.answer for task, text in zip(tasks, made, strict=True)) <= 2
