"""A model is a folder, or a repository that the hub's cache holds or the network brings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from zllm.errors import ModelLoadError
from zllm.runtime.hub import resolve_model


def test_a_folder_is_itself(tmp_path):
    assert resolve_model(tmp_path) == tmp_path


def test_a_file_is_no_model(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(ModelLoadError, match="give the folder that holds it"):
        resolve_model(path)


@pytest.mark.parametrize("name", ["/no/such/folder", "nothing", "a/b/c", "./x/y"])
def test_what_is_neither_folder_nor_hub_id_is_refused(name):
    with pytest.raises(ModelLoadError, match="neither a folder nor a hub id"):
        resolve_model(name)


@pytest.mark.parametrize(
    ("name", "why"),
    [("a" * 300, "File name too long"), ("~nobody-of-this-name/model", "home directory")],
)
def test_a_path_that_cannot_be_looked_at_says_why(name, why):
    with pytest.raises(ModelLoadError, match=f"cannot be looked at: .*{why}"):
        resolve_model(name)


def test_a_folder_in_another_users_folder_says_so(tmp_path, monkeypatch):
    def denied(*_, **__):  # a mode would not stop root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.stat", denied)
    with pytest.raises(ModelLoadError, match=r"Permission denied.*server.s user"):
        resolve_model(tmp_path / "model")


def offline(cache: Path, model: str) -> subprocess.CompletedProcess[str]:
    """`resolve_model` in a process of its own: the hub reads its environment once."""
    code = (
        "import sys; from zllm.runtime.hub import resolve_model; print(resolve_model(sys.argv[1]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, model],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_offline_a_cached_repository_is_found(tmp_path):
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert offline(tmp_path, "owner/name").stdout.strip() == str(snapshot)


def test_offline_any_other_repository_says_what_to_do(tmp_path):
    done = offline(tmp_path, "owner/other")
    assert done.returncode == 1
    assert "ModelLoadError" in done.stderr
    assert "HF_HUB_OFFLINE" in done.stderr


def test_what_a_tokenizer_and_its_templates_are_made_of_is_downloaded(tmp_path, monkeypatch):
    files = [
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "chat_template.jinja", "additional_chat_templates/tool_use.jinja",
    ]  # fmt: skip
    downloaded = []

    def download(repository, *, allow_patterns):
        downloaded.extend(filter_repo_objects([*files, "model.bin"], allow_patterns=allow_patterns))
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("owner/name") == tmp_path
    assert downloaded == files
