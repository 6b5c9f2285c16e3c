"""The doctor names what is missing and never fails itself."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from zllm.cuda import compiler, doctor
from zllm.errors import KernelError


def _problems() -> dict[str, str]:
    return {f.name: f.problem for f in doctor.examine() if f.problem}


def test_everything_is_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZLLM_KERNEL_CACHE", str(tmp_path))
    findings = doctor.examine()
    names = [f.name for f in findings]
    assert names[:2] == ["driver", "torch"]
    assert {"NVRTC", "headers", "kernel cache"} <= set(names)
    assert not {"NVRTC", "headers", "kernel cache"} & set(_problems())
    assert len(doctor.render(findings).splitlines()) == len(findings) + len(_problems())


def test_a_missing_gpu_nvrtc_or_header_is_a_problem_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> None:
        raise KernelError("gone: pip install it")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compiler, "nvrtc_version", missing)
    monkeypatch.setattr(compiler, "find_headers", missing)
    problems = _problems()
    assert problems["NVRTC"] == problems["headers"] == "gone: pip install it"
    assert "no GPU" in problems["GPU"]


def test_an_old_driver_is_told_from_none(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    success = driver.CUresult.CUDA_SUCCESS
    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (success, 12040))
    assert "older than CUDA 13.0" in _problems()["driver"]
    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (success, 0))
    assert _problems()["driver"] == "install NVIDIA's driver"


def test_a_cache_that_cannot_be_written_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZLLM_KERNEL_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        assert "set ZLLM_KERNEL_CACHE" in _problems()["kernel cache"]


def test_whatever_a_check_raises_becomes_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Path:
        raise ValueError("odd")

    monkeypatch.setattr(compiler, "default_cache_dir", broken)
    assert _problems()["kernel cache"] == "ValueError: odd"


@pytest.mark.gpu
def test_a_healthy_machine_launches_the_test_kernel() -> None:
    assert "test kernel" not in _problems()
    assert any(f.name == "test kernel" for f in doctor.examine())
