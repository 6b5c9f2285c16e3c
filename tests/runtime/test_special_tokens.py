"""A token is special, and known to the template, where it is so to transformers.

tokenizer.json holds <s>, which is special, and <a>, <b> and <c>, which are not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, pre_tokenizers
from transformers import AutoTokenizer

from tests.runtime.test_tokenizer import LLAMA3_PATTERN, split, trained
from zllm.errors import ModelLoadError
from zllm.runtime.chat_template import load_chat_template
from zllm.runtime.hf_tokenizer import HFTokenizer
from zllm.runtime.special_tokens import load_special_tokens
from zllm.runtime.tiktoken_tokenizer import TiktokenTokenizer
from zllm.runtime.tokenizer import Tokenizer, load_tokenizer

TEXT = "x<s>y<a>z<b>u<c>"
SHAPE = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
A: dict[str, Any] = {"content": "<a>", **SHAPE}
SAVED_A: dict[str, Any] = {"__type": "AddedToken", **A, "special": True}
SAVED_B: dict[str, Any] = {**SAVED_A, "content": "<b>"}
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TEMPLATE = "".join(f"{name} {{{{ {name} }}}} " for name in (*NAMES, "image_token", "audio"))


def described(*special: str) -> dict[str, Any]:
    """An `added_tokens_decoder`, of <s> and of what is `special` beside it."""
    ids = {"<s>": 0, "<a>": 600, "<b>": 601, "<c>": 602}
    return {
        str(n): {"content": c, **SHAPE, "special": c in ("<s>", *special)} for c, n in ids.items()
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    **{name: {name: "<a>"} for name in NAMES},
    "a token as an object": {"eos_token": SAVED_A},
    "a name of its own": {"image_token": "<a>"},
    "no token": {"image": "<a>", "add_bos_token": True, "pad_token": None},
    "extra, by name": {"extra_special_tokens": {"image_token": "<a>", "audio": SAVED_B}},
    "additional, by name": {"additional_special_tokens": {"audio": "<a>"}},
    "of the model": {"model_specific_special_tokens": {"image_token": "<a>"}},
    "the decoder": {"added_tokens_decoder": described("<a>", "<c>")},
    "a name beside the decoder": {"added_tokens_decoder": described(), "eos_token": "<a>"},
}
LISTS: dict[str, dict[str, Any]] = {
    "additional": {"additional_special_tokens": ["<a>", "<b>"]},
    "extra": {"extra_special_tokens": ["<a>", SAVED_B]},
    "beside the decoder": {
        "additional_special_tokens": ["<a>"],
        "added_tokens_decoder": described("<b>"),
    },
}
MAPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alone": ({}, {"bos_token": "<a>", "eos_token": "<b>"}),
    "an object": ({}, {"bos_token": A}),
    "by name": ({}, {"extra_special_tokens": {"image_token": "<a>"}}),
    "beside other names": ({"bos_token": "<b>"}, {"eos_token": "<a>"}),
    "over the config": ({"bos_token": "<b>"}, {"bos_token": "<a>"}),
    "null over the config": ({"bos_token": "<b>"}, {"bos_token": None}),
    "beside the decoder": ({"added_tokens_decoder": described()}, {"bos_token": "<a>"}),
}


def write(
    folder: Path,
    config: dict[str, Any],
    *,
    legacy: dict[str, Any] | None = None,
    kind: type[Tokenizer] = TiktokenTokenizer,
    transformers: str = "PreTrainedTokenizerFast",
) -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(), byte_level])
    tokenizer = trained(split(LLAMA3_PATTERN) if kind is TiktokenTokenizer else digits)
    tokenizer.add_tokens([AddedToken(c, normalized=False) for c in ("<a>", "<b>", "<c>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": transformers, "chat_template": TEMPLATE, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if legacy is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(legacy))


def assert_as_transformers(folder: Path, kind: type[Tokenizer]) -> None:
    reference = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    assert isinstance(ours, kind)
    ids = ours.encode(TEXT, add_special_tokens=False)
    assert ids == reference.encode(TEXT, add_special_tokens=False)
    for skip in (True, False):
        expected = reference.decode(ids, skip_special_tokens=skip)
        assert ours.decode(ids, skip_special_tokens=skip) == expected


def assert_same_prompt(folder: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    template = load_chat_template(folder)
    assert template is not None
    made = template.render(messages)
    template.close()
    reference = AutoTokenizer.from_pretrained(folder)
    assert made == reference.apply_chat_template(messages, tokenize=False)


both = pytest.mark.parametrize("kind", [TiktokenTokenizer, HFTokenizer])


@both
@pytest.mark.parametrize("case", CONFIGS)
def test_what_the_config_names_is_special(case: str, kind: type[Tokenizer], tmp_path: Path) -> None:
    write(tmp_path, CONFIGS[case], kind=kind)
    assert_as_transformers(tmp_path, kind)


@both
@pytest.mark.parametrize("case", LISTS)
def test_what_the_config_lists_is_special(case: str, kind: type[Tokenizer], tmp_path: Path) -> None:
    """To transformers' Qwen2Tokenizer, which Qwen3 has too, and not to all of its classes."""
    write(tmp_path, LISTS[case], kind=kind, transformers="Qwen2Tokenizer")
    assert_as_transformers(tmp_path, kind)


@both
@pytest.mark.parametrize("case", MAPS)
def test_what_an_older_checkpoints_map_names_is_special(
    case: str, kind: type[Tokenizer], tmp_path: Path
) -> None:
    config, legacy = MAPS[case]
    write(tmp_path, config, legacy=legacy, kind=kind)
    assert_as_transformers(tmp_path, kind)


@both
@pytest.mark.parametrize("config", [{}, {"additional_special_tokens": ["<b>"]}], ids=["", "over"])
def test_what_an_older_checkpoints_map_lists_is_special(
    config: dict[str, Any], kind: type[Tokenizer], tmp_path: Path
) -> None:
    legacy = {"additional_special_tokens": ["<a>"]}
    write(tmp_path, config, legacy=legacy, kind=kind, transformers="Qwen2Tokenizer")
    assert_as_transformers(tmp_path, kind)


@pytest.mark.parametrize("case", CONFIGS)
def test_the_template_knows_what_the_config_names(case: str, tmp_path: Path) -> None:
    write(tmp_path, CONFIGS[case])
    assert_same_prompt(tmp_path)


@pytest.mark.parametrize("case", MAPS)
def test_the_template_knows_what_the_map_names(case: str, tmp_path: Path) -> None:
    config, legacy = MAPS[case]
    write(tmp_path, config, legacy=legacy)
    assert_same_prompt(tmp_path)


def test_objects_that_transformers_refuses_are_read_all_the_same(tmp_path: Path) -> None:
    """Those without a type, as they are in special_tokens_map.json."""
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": A, "extra_special_tokens": [{**A, "content": "<b>"}]})
    )
    special = load_special_tokens(tmp_path)
    assert special.named == {"bos_token": "<a>"}
    assert special.contents == {"<a>", "<b>"}


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_corrupt_file_is_named(name: str, tmp_path: Path) -> None:
    write(tmp_path, {})
    for text, reason in (("{", "cannot be read"), ("[]", "holds no JSON object")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ModelLoadError, match=f"{name} {reason}"):
            load_tokenizer(tmp_path)
