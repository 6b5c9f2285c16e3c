"""The Node example, with npm's own packages."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.service.test_processes import serving

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clients/node with its packages installed."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("neither node nor npm on PATH")
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "generate.js"):
        shutil.copy(ROOT / "clients/node" / name, folder)
    install = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"]
    try:
        done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("npm install took more than 120 s")
    if done.returncode:
        pytest.skip(f"npm install failed: {done.stderr[-300:]}")
    return folder


def run(example: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ZLLM_PROTOS": str(ROOT / "protos")}
    return subprocess.run(
        ["node", "generate.js", *arguments],
        cwd=example, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_it_streams_an_answer_and_tells_of_failure(example: Path) -> None:
    with serving() as served:
        answer = run(example, "What is 12 + 7?", served.target)
        assert (answer.returncode, answer.stderr) == (0, "")
        text, usage = answer.stdout.splitlines()
        assert text == "12 + 7 = 19"
        assert usage.endswith("tokens]")
        served.until_idle()
        assert served.end() == 0
        refused = run(example, "What is 12 + 7?", served.target)
        assert refused.returncode == 1
        assert refused.stderr.startswith("UNAVAILABLE")
