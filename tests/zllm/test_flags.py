"""Settings: a flag goes before the environment, that before the file, that before the default."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

from zllm.errors import ConfigError
from zllm.flags import HELP, add_flags, build, flags_of, merge
from zllm.runtime.config import EngineConfig
from zllm.service.config import ServerConfig


@dataclass(frozen=True, kw_only=True)
class Sample:
    model: Path = Path("x")
    max_model_len: int | None = None
    share: float = 0.5
    enable_cache: bool = True
    eager: bool | None = None
    mode: Literal["auto", "slow"] = "auto"


@pytest.fixture(autouse=True)
def help_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("share", "enable_cache", "eager", "mode"):
        monkeypatch.setitem(HELP, name, name)


def settle(argv: list[str], env: dict[str, str] | None = None, file: Path | None = None) -> Sample:
    parser = argparse.ArgumentParser()
    add_flags(parser, Sample)
    given = vars(parser.parse_args(argv))
    return build(Sample, merge(given, env or {}, file, [Sample]))


def test_without_any_source_the_defaults_stand() -> None:
    assert settle([]) == Sample()


def test_each_source_is_read_and_the_nearer_one_wins(tmp_path: Path) -> None:
    file = tmp_path / "z.yaml"
    file.write_text("max-model-len: 10\nshare: 0.1\nmode: slow\nenable_cache: false\n")
    assert settle([], {}, file) == Sample(
        max_model_len=10, share=0.1, mode="slow", enable_cache=False
    )
    env = {"ZLLM_MAX_MODEL_LEN": "20", "ZLLM_SHARE": "0.2", "ZLLM_ENABLE_CACHE": "yes"}
    by_env = settle([], env, file)
    assert by_env == Sample(max_model_len=20, share=0.2, mode="slow", enable_cache=True)
    by_flag = settle(["--max-model-len", "30", "--no-enable-cache"], env, file)
    assert by_flag == Sample(max_model_len=30, share=0.2, mode="slow", enable_cache=False)


@pytest.mark.parametrize(
    "line", ["share:", "share: true", "max_model_len: 1.5", "max_model_len: true", "mode: [slow]"]
)
def test_a_slip_in_the_file_is_told_and_not_converted(tmp_path: Path, line: str) -> None:
    file = tmp_path / "z.yaml"
    file.write_text(line)
    with pytest.raises(ConfigError, match=line.partition(":")[0]):
        settle([], {}, file)


def test_the_environment_need_not_make_sense_where_a_flag_is_given() -> None:
    env = {"ZLLM_SHARE": "tcp://10.0.0.1:50051"}  # what Kubernetes injects for a service's name
    assert settle(["--share", "0.3"], env).share == 0.3
    with pytest.raises(ConfigError, match="ZLLM_SHARE"):
        settle([], env)


def test_a_tri_state_flag_says_yes_no_or_nothing() -> None:
    assert settle([]).eager is None
    assert settle(["--eager"]).eager is True
    assert settle(["--no-eager"]).eager is False
    assert settle([], {"ZLLM_EAGER": "off"}).eager is False


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"ZLLM_MAX_MODEL_LEN": "many"}, "ZLLM_MAX_MODEL_LEN"),
        ({"ZLLM_ENABLE_CACHE": "perhaps"}, "ZLLM_ENABLE_CACHE"),
        ({"ZLLM_MODE": "fast"}, "auto, slow"),
        ({"ZLLM_SHARE": ""}, "ZLLM_SHARE"),
    ],
)
def test_a_bad_value_of_the_environment_is_named(env: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        settle([], env)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("max-modle-len: 3", "max_model_len"),
        ("mode: fast", "mode"),
        ("- a\n- b", "setting: value"),
        ("a: [", "not YAML"),
        ("mode: 2021-13-45", "not YAML"),
        ("share: !!bool x", "not YAML"),
        ("[" * 3000, "not YAML"),
        ("share: [1]", "share"),
    ],
)
def test_a_bad_file_is_named_with_the_remedy(tmp_path: Path, content: str, named: str) -> None:
    file = tmp_path / "z.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=named):
        settle([], {}, file)


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        settle([], {}, tmp_path / "none.yaml")


def test_every_setting_of_server_and_engine_is_a_flag_with_help() -> None:
    names = {flag.name for flag in flags_of(ServerConfig, EngineConfig)}
    expected = {field.name for field in (*fields(ServerConfig), *fields(EngineConfig))} - {"model"}
    assert names == expected
    assert names <= set(HELP)


@pytest.mark.parametrize(
    "option",
    ["--max-model-len", "--max-num-seqs", "--max-num-batched-tokens", "--gpu-memory-utilization",
     "--dtype", "--kv-cache-dtype", "--served-model-name", "--seed", "--num-kv-blocks",
     "--load-format", "--device", "--host", "--port", "--admin-port"],
)  # fmt: skip
def test_flags_have_the_fields_usual_names(option: str) -> None:
    assert option in {flag.option for flag in flags_of(ServerConfig, EngineConfig)}
