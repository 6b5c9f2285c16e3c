"""config.json as the field writes it, and what is said of a bad one."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from tests.runtime.checkpoints import make_hf_model, save
from zllm.errors import ConfigError, ModelLoadError
from zllm.runtime.model_config import ModelConfig
from zllm.runtime.models.architectures import SUPPORTED
from zllm.runtime.models.registry import MODELS, model_class

BASE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}


def read(generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    raw = {name: value for name, value in {**BASE, **changes}.items() if value is not None}
    return ModelConfig.from_dict(raw, generation)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e6},
        {"rope_theta": 5e6, "rope_scaling": None},
        {"rope_theta": 5e6, "rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
        {"rope_parameters": {"rope_theta": 5_000_000}, "rope_theta": 1.0},
    ],
)
def test_rope_theta_in_its_old_and_its_new_place(rope):
    assert read(**rope).rope.theta == 5e6


def test_a_head_dim_left_out_is_transformers_own_and_null_shares_out_the_hidden_size():
    assert read(head_dim=None).head_dim == Qwen3Config().head_dim == 128
    assert ModelConfig.from_dict({**BASE, "head_dim": None}, None).head_dim == 16


def test_without_key_value_heads_every_head_has_its_own():
    assert read(num_key_value_heads=None).num_kv_heads == 4


def test_what_is_left_out_is_as_transformers_has_it():
    ours, theirs = read(), Qwen3Config()
    assert ours.tie_word_embeddings is theirs.tie_word_embeddings
    assert ours.attention_bias is theirs.attention_bias
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.initializer_range == theirs.initializer_range
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


def test_the_context_may_be_as_long_as_the_models_positions():
    assert [read().context_length(length) for length in (None, 100, 256)] == [256, 100, 256]
    with pytest.raises(ConfigError, match="max_model_len is 257: the model's positions end at 256"):
        read().context_length(257)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_as_the_checkpoint_has_them_but_for_the_norms(tmp_path, tied):
    model = make_hf_model(tie_word_embeddings=tied)
    counted = ModelConfig.from_folder(save(model, tmp_path)).num_parameters
    weights = [weight for name, weight in model.named_parameters() if "norm" not in name]
    assert counted == sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_checkpoints_type_under_both_of_its_names(name):
    assert read(**{name: "bfloat16"}).dtype is torch.bfloat16


def test_a_type_of_null_leaves_the_word_to_its_older_name():
    raw = {**BASE, "dtype": None, "torch_dtype": "bfloat16"}
    assert ModelConfig.from_dict(raw).dtype is torch.bfloat16


def test_generation_config_gives_end_tokens_and_sampling_defaults():
    config = read(
        {"eos_token_id": [7, 8], "temperature": 0.6, "top_p": 0.95, "top_k": 20}, eos_token_id=5
    )
    assert config.eos_token_ids == (7, 8)
    assert config.sampling.temperature == 0.6
    assert config.sampling.top_k == 20
    assert config.sampling.min_p is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 2.0),
        ("min_p", -0.1),
        ("top_k", 1.5),
        ("top_k", 2**40),
        ("temperature", 10**400),
    ],
)
def test_a_bad_sampling_default_is_named_with_its_file(field, value):
    with pytest.raises(ModelLoadError, match=rf"generation_config\.json: {field} is"):
        read({field: value})


def test_a_top_k_of_minus_1_is_all():
    assert read({"top_k": -1}).sampling.top_k == 0


def test_what_the_checkpoint_asks_for_in_vain_is_noted():
    generation = {"repetition_penalty": 1.05, "no_repeat_ngram_size": 0, "typical_p": 1.0}
    (note,) = read(generation).notes()
    assert note.startswith("generation_config.json: repetition_penalty 1.05 is not supported")
    assert not read({"num_beams": 1, "min_length": 0, "max_new_tokens": None}).notes()
    assert [note.split()[1] for note in read({"num_beams": 4, "max_new_tokens": 512}).notes()] == [
        "num_beams",
        "max_new_tokens",
    ]


@pytest.mark.parametrize("kind", [{}, {"rope_type": "default"}, {"type": "default"}])
def test_a_rope_factor_that_lacks_its_type_is_noted(kind):
    """transformers takes it as no scaling, too, with a warning."""
    config = read(rope_scaling={"factor": 4.0, "rope_theta": 5e6, **kind})
    (note,) = config.notes()
    assert config.rope.theta == 5e6
    assert note.startswith("config.json: rope_scaling.factor 4.0 without a rope_type")
    assert not read(rope_scaling={"rope_theta": 5e6, **kind}).notes()


def test_without_generation_config_the_models_own_end_token_counts():
    assert read(eos_token_id=5).eos_token_ids == (5,)
    assert read({"eos_token_id": None}, eos_token_id=5).eos_token_ids == (5,)
    assert read({"eos_token_id": []}, eos_token_id=5).eos_token_ids == ()
    assert read().eos_token_ids == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "architectures"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"vocab_size": 2**31}, r"vocab_size is 2147483648: it must be at least 1 and below 2\^31"),
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"head_dim": 33}, "head_dim is 33"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"dtype": ["bfloat16"]}, r"dtype is \['bfloat16'\]"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6': it must be a number"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"initializer_range": []}, r"initializer_range is \[\]"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'.*true or false"),
        ({"attention_bias": 0}, "attention_bias is 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "'llama3'"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one RoPE"),
        ({"rope_parameters": "default"}, "one RoPE"),
        (
            {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_type": "yarn"}},
            "rope_scaling asks for the RoPE type 'yarn'",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_theta": 1e4}},
            "rope_parameters and rope_scaling differ",
        ),
        ({"eos_token_id": [None]}, r"eos_token_id is \[None\]"),
        ({"eos_token_id": 2**40}, "eos_token_id is"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .*'full_att"),
        ({"layer_types": 5}, "layer_types is 5: only a list"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_no_model_here_implements_is_named(changes, message):
    with pytest.raises(ModelLoadError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"num_attention_heads": None, "n_head": 12},
        {"hidden_size": None, "text_config": {"hidden_size": 64}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"hidden_act": None, "quantization_config": {"bits": 4}},
    ],
)
def test_an_unknown_architecture_is_named_before_whatever_else_is_unknown_of_it(others):
    with pytest.raises(ModelLoadError, match=r"MambaForCausalLM.*Qwen3ForCausalLM"):
        read(architectures=["MambaForCausalLM"], **others)


def test_a_config_that_was_not_read_from_a_file_is_asked_for_its_architecture_too():
    config = dataclasses.replace(read(), architecture="MambaForCausalLM")
    with pytest.raises(ModelLoadError, match=r"MambaForCausalLM.*Qwen3ForCausalLM"):
        model_class(config)


def test_a_field_of_null_is_a_bad_one():
    with pytest.raises(ModelLoadError, match="rms_norm_eps is None"):
        ModelConfig.from_dict({**BASE, "rms_norm_eps": None})


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "\xff", "[" * 100_000, '{"vocab_size": ' + "1" * 5000 + "}"],
    ids=["cut", "list", "bytes", "deep", "digits"],
)
def test_a_corrupt_file_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_a_folder_without_config_says_what_to_give(tmp_path):
    with pytest.raises(ModelLoadError, match="give the folder of a Hugging Face checkpoint"):
        ModelConfig.from_folder(tmp_path)


def test_both_files_are_read_from_the_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    (tmp_path / "generation_config.json").write_text(json.dumps({"min_p": 0.1}))
    config = ModelConfig.from_folder(tmp_path)
    assert config.vocab_size == 1000
    assert config.sampling.min_p == 0.1


def test_what_is_supported_by_name_has_a_class() -> None:
    assert set(SUPPORTED) == set(MODELS)
