"""Checkpoints of every form load to the same weights; a bad one is described."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.runtime.checkpoints import make_hf_model, save
from zllm.errors import ModelLoadError
from zllm.runtime.loader import dummy_weights, load_weights, weights_bytes
from zllm.runtime.model_config import ModelConfig
from zllm.runtime.models.parameters import Weights
from zllm.runtime.models.qwen3 import Qwen3

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def hf_model():
    return make_hf_model(seed=1)


@pytest.fixture
def folder(hf_model, tmp_path):
    return save(hf_model, tmp_path / "model")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Weights:
    config = ModelConfig.from_folder(folder)
    return load_weights(folder, Qwen3.parameters(config), dtype, CPU)


def edit(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_projections_are_merged_in_order(folder, hf_model):
    attention = hf_model.model.layers[1].self_attn
    mlp = hf_model.model.layers[1].mlp
    weights = load(folder)
    parts = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
    assert torch.equal(weights["layers.1.qkv"], torch.cat(parts))
    parts = (mlp.gate_proj.weight, mlp.up_proj.weight)
    assert torch.equal(weights["layers.1.gate_up"], torch.cat(parts))
    assert torch.equal(weights["head"], hf_model.lm_head.weight)


def test_shards_load_as_one_file_does(folder, hf_model, tmp_path):
    shards = save(hf_model, tmp_path / "shards", max_shard_size="40KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    single, sharded = load(folder), load(shards)
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)


def test_a_tied_checkpoint_has_no_head(tmp_path):
    model = make_hf_model(tie_word_embeddings=True)
    weights = load(save(model, tmp_path))
    assert "head" not in weights
    assert torch.equal(weights["embedding"], model.lm_head.weight)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_converted(folder, hf_model, stored, wanted):
    edit(folder, lambda t: t.update({name: value.to(stored) for name, value in t.items()}))
    down = load(folder, wanted)["layers.0.down"]
    assert down.dtype is wanted
    assert torch.equal(down, hf_model.model.layers[0].mlp.down_proj.weight.to(stored).to(wanted))


def test_a_missing_tensor_is_named(folder):
    edit(folder, lambda t: t.pop("model.layers.2.self_attn.k_norm.weight"))
    with pytest.raises(
        ModelLoadError, match=r"1 tensors are missing.*layers\.2\.self_attn\.k_norm"
    ):
        load(folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(folder):
    edit(folder, lambda t: t.update({"model.norm.weight": torch.zeros(47)}))
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight has shape \[47\].*\[48\]"):
        load(folder)


def test_a_quantized_tensor_is_refused(folder):
    edit(folder, lambda t: t.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}))
    with pytest.raises(ModelLoadError, match="type I8"):
        load(folder)


@pytest.mark.parametrize("size", [0, 5, 100, 20_000])
def test_a_truncated_file_is_called_corrupt(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is corrupt"):
        load(folder)


@pytest.mark.parametrize("kind", ["link to nowhere", "folder", "no permission"])
def test_a_file_that_cannot_be_read_is_not_called_corrupt(folder, monkeypatch, kind):
    path = folder / "model.safetensors"
    if kind == "no permission":
        # safetensors says of it that there is no such file. (A mode would not stop root.)
        def denied(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("pathlib.Path.open", denied)
    else:
        path.unlink()
        path.mkdir() if kind == "folder" else path.symlink_to("../blobs/gone")
    why = {"folder": "Is a directory", "no permission": "Permission denied"}.get(kind, "No such")
    with pytest.raises(ModelLoadError, match=rf"model\.safetensors cannot be read: .*{why}"):
        load_weights(folder, [], torch.float32, CPU)


def test_a_folder_without_weights_says_what_it_looked_for(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"no \*\.safetensors file"):
        load(folder)


def test_a_missing_shard_is_named(hf_model, tmp_path):
    folder = save(hf_model, tmp_path, max_shard_size="40KB")
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelLoadError, match=f"{lost.name} is missing"):
        load(folder)


@pytest.mark.parametrize("name", ["ema.safetensors", "model.safetensors.index.json"])
def test_the_file_of_all_weights_comes_before_whatever_else_is_there(folder, hf_model, name):
    if name.endswith(".json"):
        (folder / name).write_text('{"weight_map": {"model.norm.weight": "old.safetensors"}}')
    else:
        others = {
            k: torch.zeros_like(v) for k, v in load_file(folder / "model.safetensors").items()
        }
        save_file(others, folder / name)
    assert torch.equal(load(folder)["head"], hf_model.lm_head.weight)


def test_a_tensor_in_two_files_is_named_with_both(folder):
    whole = folder / "model.safetensors"
    shutil.copy(whole, folder / "a.safetensors")
    whole.rename(folder / "b.safetensors")
    with pytest.raises(ModelLoadError, match=r"b\.safetensors: tensor .* is in a\.safetensors too"):
        load(folder)


def test_what_the_file_has_and_config_json_does_not_ask_for_is_told(folder, caplog):
    load(folder)
    assert not caplog.messages
    bias = "model.layers.0.self_attn.q_proj.bias"
    edit(folder, lambda t: t.update({bias: torch.ones(64)}))
    load(folder)
    (message,) = caplog.messages
    assert f"1 tensors are not used, among them {bias}" in message
    assert "config.json" in message


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_checkpoint_may_hold_its_head_but_no_other(tmp_path, caplog, same):
    model = make_hf_model(tie_word_embeddings=True)
    folder = save(model, tmp_path)
    head = model.lm_head.weight.detach().clone()
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": head if same else head + 1}))
    if same:
        assert torch.equal(load(folder)["embedding"], head)
        assert not caplog.messages
    else:
        with pytest.raises(ModelLoadError, match=r"lm_head\.weight is not the embedding"):
            load(folder)


@pytest.mark.parametrize("same", [True, False])
def test_the_head_of_a_tied_checkpoint_may_be_in_another_file(tmp_path, same):
    model = make_hf_model(tie_word_embeddings=True)
    folder = save(model, tmp_path)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    head = model.lm_head.weight.detach().clone()
    save_file({"lm_head.weight": head if same else head + 1}, folder / "b.safetensors")
    if same:
        assert torch.equal(load(folder)["embedding"], head)
    else:
        with pytest.raises(ModelLoadError, match=r"lm_head\.weight is not the embedding"):
            load(folder)


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"model.norm.weight": 3}}',
        '{"weight_map": {"model.norm.weight": null}}',
        "[" * 100_000,
    ],
    ids=["cut", "list", "empty", "no-map", "number", "null", "deep"],
)
def test_a_corrupt_index_is_named(folder, index):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelLoadError, match=r"index\.json is corrupt"):
        load(folder)


def test_a_name_in_the_index_that_no_file_can_have_is_a_missing_file(folder):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    index = {"weight_map": {"model.norm.weight": "a" * 300}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=r"aaa is missing"):
        load(folder)


def test_an_index_cannot_name_a_file_outside_of_the_folder(folder):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    outside = {"weight_map": {"model.norm.weight": "../model/other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(outside))
    with pytest.raises(ModelLoadError, match="outside of the model's folder"):
        load(folder)


def test_dummy_weights_have_the_models_shapes_and_deviation(folder):
    parameters = list(Qwen3.parameters(ModelConfig.from_folder(folder)))
    weights = dummy_weights(parameters, torch.bfloat16, CPU, std=0.02, seed=4)
    assert weights.keys() == load(folder).keys()
    assert weights["layers.0.gate_up"].float().std().item() == pytest.approx(0.02, rel=0.05)
    assert bool((weights["final_norm"] == 1).all())
    assert weights_bytes(weights) * 2 == weights_bytes(load(folder))
