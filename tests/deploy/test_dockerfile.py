"""The image: lint-free, without root, and with commands that zllm has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from zllm import cli

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy/Dockerfile"
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which(
    "hadolint"
)


def instructions() -> list[tuple[str, str]]:
    """Each instruction and its words, continued lines joined."""
    text = re.sub(r"(?m)^\s*#.*\n", "", DOCKERFILE.read_text()).replace("\\\n", " ")
    parts = (line.partition(" ") for line in text.splitlines() if line)
    return [(name, " ".join(words.split())) for name, _, words in parts]


def last_stage() -> list[tuple[str, str]]:
    found = instructions()
    starts = [index for index, (name, _) in enumerate(found) if name == "FROM"]
    assert len(starts) == 2, "one stage builds, the other runs"
    return found[starts[-1] :]


@pytest.mark.skipif(HADOLINT is None, reason="no hadolint here")
def test_the_linter_finds_nothing() -> None:
    done = subprocess.run([HADOLINT or "", str(DOCKERFILE)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_it_runs_as_a_numbered_user_that_is_not_root() -> None:
    users = [words for name, words in last_stage() if name == "USER"]
    assert len(users) == 1
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[0])


def test_its_commands_are_zllms(capsys: pytest.CaptureFixture[str]) -> None:
    stage = dict(last_stage())
    assert json.loads(stage["ENTRYPOINT"]) == ["zllm", "serve"]
    name, *arguments = json.loads(stage["HEALTHCHECK"].partition("CMD ")[2])
    assert name == "zllm"
    # Nothing serves here: the check says so, and not that it was used wrongly.
    assert cli.main([*arguments, "--target", "127.0.0.1:1"]) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err


def test_all_that_the_build_needs_is_let_in_and_no_more() -> None:
    lines = (ROOT / "deploy/Dockerfile.dockerignore").read_text().split()
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["scikit-build"]["wheel"]["packages"].values()
    needed = {*packages, "cython", "protos", "pyproject.toml", "CMakeLists.txt", "constraints.txt"}
    needed |= {project["project"]["readme"], *project["project"]["license-files"]}
    assert let_in == needed
    assert all((ROOT / name).exists() for name in let_in)
