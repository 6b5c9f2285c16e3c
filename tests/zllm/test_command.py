"""The command's way with what its caller left open, and what it cannot read or write."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zllm.cli import main


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_closed_standard_file_is_not_the_number_of_another(closed: tuple[int, ...]) -> None:
    code = (
        "import os, sys; from zllm.cli import main\n"
        f"[os.close(n) for n in {closed}]\n"
        "try: main(['--version'])\n"
        "except SystemExit: pass\n"
        "opened = os.open(os.devnull, os.O_RDWR)\n"
        "os._exit(0 if opened > 2 else 9)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert run.returncode == 0


def test_a_key_file_that_is_no_text_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"\xff\xfe")
    assert main(["generate", "hi", "--api-key-file", str(file)]) == 1
    assert f"--api-key-file {file}: it is not text" in capsys.readouterr().err


def test_input_that_is_no_text_or_closed_is_told_and_no_traceback(tmp_path: Path) -> None:
    file = tmp_path / "input"
    file.write_bytes(b"\xff\n")
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    zllm, nowhere = f"{sys.executable} -m zllm", "--target 127.0.0.1:1"
    for line, code, told in (
        (f"{zllm} generate - {nowhere} < {file}", 1, "prompt: cannot be sent"),
        (f"{zllm} chat {nowhere} < {file}", 0, "prompt: cannot be sent"),
        (f"{zllm} generate - {nowhere} <&-", 1, "127.0.0.1:1"),
        (f"{zllm} chat {nowhere} <&-", 0, ""),
    ):
        run = subprocess.run(
            line, shell=True, check=False, capture_output=True, text=True, env=strict, timeout=60
        )
        assert run.returncode == code, run.stderr
        assert told in run.stderr
        assert "Traceback" not in run.stderr


def test_a_folder_too_long_for_sockets_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert main(["serve", "--port", "0", "--admin-port", "0", "--no-metrics"]) == 1
    assert "TMPDIR" in capsys.readouterr().err
    assert not os.listdir(folder)
