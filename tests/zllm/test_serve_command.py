"""What `zllm serve` makes of its arguments, the environment and a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zllm.cli import main
from zllm.runtime.config import EngineConfig
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.service.config import ServerConfig


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ServerConfig, EngineConfig]]:
    """Records what would be served in place of serving it."""
    calls: list[tuple[ServerConfig, EngineConfig]] = []

    def record(
        server: ServerConfig, models: list[EngineConfig], template: EngineConfig, **_: Any
    ) -> int:
        calls.extend((server, model) for model in models)
        return 0

    monkeypatch.setattr("zllm.service.serve.run", record)
    return calls


def test_without_a_model_the_embedded_one_is_served(served: list[Any]) -> None:
    assert main(["serve"]) == 0
    ((server, engine),) = served
    assert server == ServerConfig()
    assert engine.model == EMBEDDED_MODEL
    assert engine.served_model_name == "tiny"


def test_a_folder_is_served_under_its_own_name_or_a_given_one(
    served: list[Any], tmp_path: Path
) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    main(["serve", str(folder), "--no-enable-prefix-caching", "--enforce-eager"])
    main(["serve", f"{folder}/", "--served-model-name", "other"])
    (_, first), (_, second) = served
    assert first.model.samefile(folder)
    assert (first.served_model_name, second.served_model_name) == ("my-model", "other")
    assert (first.enable_prefix_caching, first.enforce_eager) == (False, True)


def test_the_model_too_comes_from_environment_or_file(
    served: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("by-file", "by-env", "by-flag"):
        (tmp_path / name).mkdir()
    file = tmp_path / "zllm.yaml"
    file.write_text(f"model: {tmp_path}/by-file\nport: 1234\nmax-num-seqs: 7\n")
    main(["serve", "--config", str(file)])
    monkeypatch.setenv("ZLLM_MODEL", f"{tmp_path}/by-env")
    monkeypatch.setenv("ZLLM_PORT", "4321")
    main(["serve", "--config", str(file)])
    main(["serve", f"{tmp_path}/by-flag", "--config", str(file), "--port", "99"])
    assert [engine.model.name for _, engine in served] == ["by-file", "by-env", "by-flag"]
    assert [server.port for server, _ in served] == [1234, 4321, 99]
    assert {engine.max_num_seqs for _, engine in served} == {7}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["serve", "./no/such/folder"], "no/such/folder"),
        (["serve", "--max-num-seqs", "0"], "max_num_seqs"),
        (["serve", "--gpu-memory-utilization", "1.5"], "gpu_memory_utilization"),
        (["serve", "--port", "99999"], "port"),
        (["serve", "--config", "/no/such/file"], "/no/such/file"),
        (["serve", "--max-message-bytes", "3000000000"], "max_message_bytes"),
        (["serve", "--max-connections", "3000000000"], "1..2147483647"),
    ],
)
def test_wrong_settings_end_with_one_and_say_which(
    arguments: list[str], named: str, served: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    assert named in capsys.readouterr().err
    assert not served
