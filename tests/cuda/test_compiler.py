"""Every kernel compiles for every architecture without a GPU, and the disk cache is safe."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
from pathlib import Path

import pytest
import torch

from zllm.cuda import (
    activation,
    batch,
    blocks,
    compiler,
    embedding,
    norm,
    rope_cache,
    sampler,
)
from zllm.cuda.compiler import Compiler, Program
from zllm.errors import KernelError
from zllm.native.arena import MACROS

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90a"]
PROGRAMS = [
    *(norm.program(dtype, 1024, rows) for dtype in (BF16, FP16, FP32) for rows in (1, 8192)),
    norm.program(BF16, 5120, 8192),
    *(activation.program(dtype, 3072) for dtype in (BF16, FP16, FP32)),
    embedding.PROGRAM,
    blocks.PROGRAM,
    batch.program(MACROS),
    *(
        rope_cache.program(BF16, BF16, 32, 8, size, qk_norm=True, tokens=64)
        for size in (64, 96, 128, 256)
    ),
    *(
        rope_cache.program(BF16, FP8, 32, 8, size, qk_norm=False, tokens=8192)
        for size in (64, 96, 128, 256)
    ),
    rope_cache.program(FP32, FP32, 16, 8, 256, qk_norm=True, tokens=1),
    rope_cache.program(FP16, FP16, 16, 8, 128, qk_norm=False, tokens=8192),
    *sampler.programs(BF16, 151936, MACROS),
    *sampler.programs(FP32, 50257, MACROS),
]


def test_no_kernel_may_read_what_a_step_writes_anew_before_it_waits() -> None:
    """The compiler moves loads of const __restrict__ across griddepcontrol.wait, on sm_100
    those of a step's arena."""
    sources = sorted((Path(compiler.__file__).parent / "kernels").glob("*.cu"))
    assert sources
    for source in sources:
        assert not re.search(r"const (int|Partial)\* __restrict__", source.read_text()), source.name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles(arch: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    made = Compiler(arch, tmp_path)
    made.compile_many(PROGRAMS, lambda done, total, _: seen.append((done, total)), workers=2)
    assert seen == [(n, len(PROGRAMS)) for n in range(1, len(PROGRAMS) + 1)]
    assert made.compiled == len(PROGRAMS)
    assert made.compile(PROGRAMS[0].source, PROGRAMS[0].defines).startswith(b"\x7fELF")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of sources with one kernel and the header that it includes."""
    folder = tmp_path / "sources"
    (folder / "kernels").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "kernels/fill.cu").write_text(
        '#include "value.cuh"\n'
        'extern "C" __global__ void fill(int* x) { x[threadIdx.x] = VALUE + EXTRA; }\n'
    )
    (folder / "include/value.cuh").write_text("#pragma once\n#define VALUE 1\n")
    return folder


def test_a_second_compiler_finds_what_the_first_made(root: Path, tmp_path: Path) -> None:
    first = Compiler("sm_80", tmp_path / "cache", root)
    second = Compiler("sm_80", tmp_path / "cache", root)
    cubin = first.compile("fill.cu", {"EXTRA": 2})
    assert second.compile("fill.cu", {"EXTRA": 2}) == cubin
    assert (first.compiled, second.compiled) == (1, 0)


def test_macros_headers_and_architecture_each_make_another_cubin(
    root: Path, tmp_path: Path
) -> None:
    made = Compiler("sm_80", tmp_path / "cache", root)
    cubins = [made.compile("fill.cu", {"EXTRA": 2}), made.compile("fill.cu", {"EXTRA": 3})]
    (root / "include/value.cuh").write_text("#pragma once\n#define VALUE 7\n")
    cubins.append(made.compile("fill.cu", {"EXTRA": 2}))
    cubins.append(Compiler("sm_90a", tmp_path / "cache", root).compile("fill.cu", {"EXTRA": 2}))
    assert len(set(cubins)) == 4


def test_what_nvrtc_says_of_a_program_that_compiles_is_logged(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "include/value.cuh").write_text("#define VALUE 1\n#warning not this way\n")
    Compiler("sm_80", tmp_path / "cache", root).compile("fill.cu", {"EXTRA": 2})
    assert "fill.cu for sm_80" in caplog.text
    assert "not this way" in caplog.text


def test_a_damaged_file_is_compiled_again(root: Path, tmp_path: Path) -> None:
    made = Compiler("sm_80", tmp_path / "cache", root)
    cubin = made.compile("fill.cu", {"EXTRA": 2})
    (file,) = (tmp_path / "cache").rglob("*.cubin")
    file.write_bytes(file.read_bytes()[:-1])
    assert made.compile("fill.cu", {"EXTRA": 2}) == cubin
    assert made.compiled == 2


def test_a_folder_that_cannot_be_written_warns_once_and_compiles(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    made = Compiler("sm_80", tmp_path / "file" / "cache", root)
    with caplog.at_level(logging.WARNING):
        for extra in (1, 2):
            assert made.compile("fill.cu", {"EXTRA": extra})
    (record,) = caplog.records
    assert "ZLLM_KERNEL_CACHE" in record.getMessage()


def _compile_in_child(root: Path, cache: Path) -> None:
    Compiler("sm_80", cache, root).compile("fill.cu", {"EXTRA": 2})


def test_processes_that_start_at_once_share_the_folder(root: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    cache = tmp_path / "cache"
    children = [context.Process(target=_compile_in_child, args=(root, cache)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert [file.suffix for file in cache.rglob("*") if file.is_file()] == [".cubin"]
    third = Compiler("sm_80", cache, root)
    third.compile("fill.cu", {"EXTRA": 2})
    assert third.compiled == 0


def test_an_error_names_file_line_and_cause(root: Path, tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r'fill\.cu\(2\): error: identifier "EXTRA"'):
        Compiler("sm_80", tmp_path, root).compile("fill.cu")


def test_a_source_that_does_not_exist_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"nothing\.cu cannot be read"):
        Compiler("sm_80", tmp_path, root).compile("nothing.cu")


def test_one_bad_program_of_many_is_raised(root: Path, tmp_path: Path) -> None:
    programs = [Program("fill.cu", {"EXTRA": 1}), Program("fill.cu")]
    with pytest.raises(KernelError, match="EXTRA"):
        Compiler("sm_80", tmp_path, root).compile_many(programs)


def test_missing_headers_say_what_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    with pytest.raises(KernelError, match="pip install nvidia-cuda-runtime"):
        compiler.find_headers()


def test_missing_nvrtc_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc

    def missing() -> None:
        raise RuntimeError("libnvrtc.so.13: not found")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", missing)
    with pytest.raises(KernelError, match=r"libnvrtc\.so\.13: not found.*pip install"):
        compiler.load_nvrtc()


def test_no_gpu_points_to_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelError, match="zllm doctor"):
        compiler.device_arch()


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a")]
)
def test_hopper_gets_its_own_instructions(
    capability: tuple[int, int], arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert compiler.device_arch() == arch


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(KernelError, match=r"7\.5.*8\.0 or newer"):
        compiler.device_arch()


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZLLM_KERNEL_CACHE", f"{os.sep}chosen")
    assert compiler.default_cache_dir() == Path(os.sep, "chosen")
    monkeypatch.delenv("ZLLM_KERNEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", f"{os.sep}caches")
    assert compiler.default_cache_dir() == Path(os.sep, "caches", "zllm", "kernels")
