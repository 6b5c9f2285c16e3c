"""LLM's way from and to text, where the template's and the last character's tokens count."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from zllm import LLM, SamplingParams
from zllm.runtime.detokenizer import Detokenizer
from zllm.runtime.embedded import EMBEDDED_MODEL

BEGIN = "<|endoftext|>"
QUESTION = [{"role": "user", "content": "What is 12 + 7?"}]


@pytest.fixture
def beginning(tmp_path: Path) -> Path:
    """A model whose tokenizer begins each text with a special token, and whose template does so,
    too."""
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED_MODEL, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (begin,) = [token["id"] for token in tokenizer["added_tokens"] if token["content"] == BEGIN]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": BEGIN, "type_id": 0}}, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BEGIN: {"id": BEGIN, "ids": [begin], "tokens": [BEGIN]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["bos_token"] = BEGIN
    config["chat_template"] = "{{ bos_token }}" + config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_special_tokens_are_added_to_text_and_not_to_a_chat(beginning: Path) -> None:
    reference = AutoTokenizer.from_pretrained(str(beginning))
    llm = LLM(beginning, device="cpu", num_kv_blocks=64)
    one = SamplingParams(max_tokens=1)
    (text,) = llm.generate("hi", one)
    assert text.prompt_token_ids == reference("hi")["input_ids"]
    (chat,) = llm.chat(QUESTION, one)
    assert chat.prompt_token_ids == reference.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_dict=False
    )
    llm.close()


def test_a_stop_string_that_the_end_completes_is_why_it_stopped() -> None:
    """Half a character at the end becomes U+FFFD."""
    llm = LLM(device="cpu", num_kv_blocks=64)
    tokenizer = llm.tokenizer
    assert tokenizer is not None

    def ends_half_way(ids: list[int]) -> bool:
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=True)
        return not detokenizer.extend(ids)[0] and detokenizer.flush() == "\ufffd"

    one = {"temperature": 3.0, "ignore_eos": True, "max_tokens": 1}
    seeds = range(2000)
    outputs = llm.generate(["x"] * len(seeds), [SamplingParams(seed=s, **one) for s in seeds])
    seed = next(
        s for s, o in zip(seeds, outputs, strict=True) if ends_half_way(o.outputs[0].token_ids)
    )
    (output,) = llm.generate("x", SamplingParams(seed=seed, stop="\ufffd", **one))
    completion = output.outputs[0]
    assert completion.text == ""
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "\ufffd")
    llm.close()
