"""A request whose logits are not finite fails alone, and leaves nothing that poisons others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.service.test_processes import copy_model, edit_json, serving
from zllm import LLM, SamplingParams
from zllm.clients.client import Client
from zllm.errors import EngineError

POISON = 895
"""An id that no text has, and whose embedding is made NaN."""
SUMS = [(a, 2 * a + 1) for a in range(1, 25)]


@pytest.fixture
def poisoned_model(tmp_path: Path) -> Path:
    folder = copy_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    # Its own head, so that the poison is in the prompt alone.
    weights["lm_head.weight"] = embedding.clone()
    embedding[POISON] = torch.nan
    save_file(weights, folder / "model.safetensors")
    edit_json(folder / "config.json", tie_word_embeddings=False)
    return folder


def test_a_poisoned_request_in_a_batch_fails_alone(poisoned_model: Path) -> None:
    with serving(str(poisoned_model)) as served, Client(served.target, attempts=1) as client:

        def ask(a: int, b: int) -> str:
            question = [{"role": "user", "content": f"What is {a} + {b}?"}]
            return client.generate(question, temperature=0.0).text

        def poison(length: int) -> None:
            with pytest.raises(EngineError):
                client.generate([5] * length + [POISON], max_tokens=20)

        with ThreadPoolExecutor(16) as pool:
            # More tokens than the cache has: what follows writes to blocks that were poisoned.
            for _ in range(2):
                answers = [pool.submit(ask, a, b) for a, b in SUMS]
                failures = [pool.submit(poison, length) for length in range(1, 1600, 200)]
                for (a, b), answer in zip(SUMS, answers, strict=True):
                    assert answer.result() == f"{a} + {b} = {a + b}"
                for failure in failures:
                    failure.result()
        served.until_idle()


def test_offline_the_other_prompts_are_answered(poisoned_model: Path) -> None:
    llm = LLM(poisoned_model, device="cpu", max_num_seqs=8, max_num_batched_tokens=32)
    try:
        questions = [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in SUMS]
        params = SamplingParams(temperature=0.0, max_tokens=20)
        assert llm.chat_template is not None
        prompts = [llm.chat_template.render(question) for question in questions]
        outputs = llm.generate([[POISON] + [5] * 100, *prompts, [5] * 100 + [POISON]], params)
    finally:
        llm.close()
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert reasons == ["error", *["eos"] * len(SUMS), "error"]
    for (a, b), output in zip(SUMS, outputs[1:-1], strict=True):
        assert output.outputs[0].text == f"{a} + {b} = {a + b}"
