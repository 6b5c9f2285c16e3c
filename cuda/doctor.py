"""What the CUDA engine needs of a machine, found out and said: `zllm doctor` prints it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from zllm.cuda import compiler
from zllm.errors import KernelError

MIN_DRIVER = 13000
"""The oldest driver, as the CUDA version that it serves: cubins of NVRTC 13 need one of 13."""
_PROBE = """extern "C" __global__ void probe(int* x) { *x = 1; }\n"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    name: str
    value: str
    problem: str = ""
    """What is wrong and what to do; empty where all is well."""


def examine() -> list[Finding]:
    """GPU, driver, torch, NVRTC, headers, cache, and one kernel compiled and launched. Each is
    looked at though another failed; nothing is raised."""
    checks: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("driver", _driver),
        ("torch", _torch),
        ("GPU", _gpus),
        ("NVRTC", _nvrtc),
        ("headers", _headers),
        ("kernel cache", _cache),
        ("test kernel", _launch),
    )
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings.extend(check())
        except Exception as error:  # a broken machine raises anything; the report goes on
            findings.append(Finding(name, "broken", f"{type(error).__name__}: {error}"))
    return findings


def render(findings: list[Finding]) -> str:
    """The report as text: a line a finding, problems under their line."""
    width = max(len(f.name) for f in findings)
    lines = []
    for f in findings:
        lines.append(f"{'!' if f.problem else ' '} {f.name:{width}}  {f.value}")
        if f.problem:
            lines.append(f"  {'':{width}}  -> {f.problem}")
    return "\n".join(lines)


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver() -> Iterator[Finding]:
    try:
        from cuda.bindings import driver

        status, version = driver.cuDriverGetVersion()
    except Exception as error:  # the bindings or libcuda are missing, each in a way of its own
        remedy = "install NVIDIA's driver, and zllm with its extra [cuda]"
        yield Finding("driver", f"none ({error})", remedy)
        return
    if status != driver.CUresult.CUDA_SUCCESS or version == 0:
        yield Finding("driver", "none", "install NVIDIA's driver")
        return
    problem = ""
    if version < MIN_DRIVER:
        problem = (
            f"it is older than CUDA {_cuda_version(MIN_DRIVER)}: install a driver of 580 or newer"
        )
    yield Finding("driver", f"for CUDA {_cuda_version(version)}", problem)


def _torch() -> Iterator[Finding]:
    built = torch.version.cuda
    problem = "" if built else "this build of torch has no CUDA: install one that has"
    yield Finding("torch", f"{torch.__version__}, CUDA {built or 'none'}", problem)


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("GPU", "none", "torch finds no GPU: the CPU engine serves without one")
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        value = (
            f"{p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} "
            f"multiprocessors, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        )
        yield Finding(f"GPU {index}", value, "" if p.major >= 8 else "zllm needs 8.0 or newer")


def _nvrtc() -> Iterator[Finding]:
    try:
        major, minor = compiler.nvrtc_version()
    except KernelError as error:
        yield Finding("NVRTC", "none", str(error))
    else:
        problem = "" if major >= 13 else "pip install 'nvidia-cuda-nvrtc>=13,<14'"
        yield Finding("NVRTC", f"{major}.{minor}", problem)


def _headers() -> Iterator[Finding]:
    try:
        yield Finding("headers", str(compiler.find_headers()))
    except KernelError as error:
        yield Finding("headers", "none", str(error))


def _cache() -> Iterator[Finding]:
    folder = compiler.default_cache_dir()
    files = list(folder.rglob("*.cubin"))
    size = sum(file.stat().st_size for file in files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            problem = ""
    except OSError as error:
        problem = f"it cannot be written ({error}): set ZLLM_KERNEL_CACHE to a folder that can"
    yield Finding("kernel cache", f"{folder}, {len(files)} cubins, {size / 2**20:.1f} MiB", problem)


def _launch() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        return
    from zllm.cuda.launcher import KernelLibrary

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.mkdir(root / "kernels")
        (root / "kernels/probe.cu").write_text(_PROBE)
        library = KernelLibrary(compiler.Compiler(cache_dir=root / "cache", root=root))
        x = torch.zeros(1, dtype=torch.int32, device="cuda")
        library.get("probe.cu", "probe").launch((1, 1, 1), (1, 1, 1), (x,))
        ran = x.item() == 1
    problem = "" if ran else "it ran and wrote nothing: the driver and NVRTC do not fit"
    yield Finding("test kernel", "compiled, launched" if ran else "wrong result", problem)
