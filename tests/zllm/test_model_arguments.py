"""`--model`: names, paths, settings of one model, and how models share the memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from zllm.errors import ConfigError
from zllm.model_arguments import engine_configs, parse_model
from zllm.runtime.embedded import EMBEDDED_MODEL

TINY = str(EMBEDDED_MODEL)


@pytest.mark.parametrize(
    ("text", "name", "path", "settings"),
    [
        (TINY, "tiny", TINY, {}),
        (f"a={TINY}", "a", TINY, {}),
        (f"{TINY},max-num-seqs=3", "tiny", TINY, {"max_num_seqs": 3}),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", {}),
        (
            "small=Qwen/Qwen3-0.6B,memory_share=0.25,enforce_eager=yes",
            "small",
            "Qwen/Qwen3-0.6B",
            {"memory_share": 0.25, "enforce_eager": True},
        ),
    ],
)
def test_a_model_is_a_name_a_path_and_settings(
    text: str, name: str, path: str, settings: dict[str, object]
) -> None:
    found = parse_model(text)
    assert (found.name, found.path, found.settings) == (name, path, settings)


def test_a_folder_may_have_signs_that_otherwise_separate(tmp_path: Path) -> None:
    folder = tmp_path / "a=b,c"
    folder.mkdir()
    assert parse_model(str(folder)).path == str(folder)


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ([f"a={TINY},max_sequences=3"], "'max_sequences' is no setting"),
        ([f"a={TINY},max_num_seqs=many"], "a whole number"),
        ([f"a={TINY},gpu_memory_utilization=0.5"], "memory_share"),
        (["a="], "no path"),
        ([f"a b={TINY}"], "'a b'"),
        ([f"a={TINY}", f"a={TINY}"], "two models are called 'a'"),
        ([f"a={TINY},memory_share=0.7", f"b={TINY},memory_share=0.7"], "leave nothing"),
        ([f"a={TINY},memory_share=1", f"b={TINY}"], "leave nothing"),
        ([f"a={TINY},memory_share=2"], "memory_share"),
    ],
)
def test_what_cannot_be_meant_is_named(models: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        engine_configs(models, {})


def test_one_name_for_several_models_is_refused() -> None:
    with pytest.raises(ConfigError, match="NAME=PATH"):
        engine_configs([f"a={TINY}", f"b={TINY}"], {"served_model_name": "c"})


def test_models_share_evenly_what_named_shares_leave() -> None:
    models = [f"a={TINY},memory_share=0.4", f"b={TINY}", f"c={TINY}"]
    shares = [config.memory_share for config in engine_configs(models, {})]
    assert shares == pytest.approx([0.4, 0.3, 0.3])
    (alone,) = engine_configs([TINY], {})
    assert alone.memory_share == 1.0


def test_fixed_blocks_take_no_share() -> None:
    models = [f"a={TINY},num_kv_blocks=9", f"b={TINY}"]
    a, b = engine_configs(models, {"max_num_seqs": 5})
    assert (a.num_kv_blocks, a.memory_share, a.max_num_seqs) == (9, None, 5)
    assert (b.num_kv_blocks, b.memory_share, b.max_num_seqs) == (None, 1.0, 5)
