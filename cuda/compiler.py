"""NVRTC to cubin, for one architecture, remembered on disk.

A cubin is found again by the hash of everything that decides it: the source, the headers of
`cuda/include` that it reaches, the options (architecture and macros among them) and NVRTC's
version. Files appear by rename, so that any number of processes may share one folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from zllm.errors import KernelError

Progress = Callable[[int, int, str], None]
"""Told (done, total, source) after each program."""

_log = logging.getLogger(__name__)
_OPTIONS = ("--std=c++17", "-default-device", "--generate-line-info")
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Program:
    """One source of `cuda/kernels` with its macros."""

    source: str
    defines: Mapping[str, str | int] = field(default_factory=dict)


def load_nvrtc() -> ModuleType:
    """The bindings of NVRTC; KernelError with the remedy when they or the library are missing."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except Exception as error:  # the bindings raise a class of their own for each cause
        raise KernelError(
            f"NVRTC cannot be loaded ({error}): pip install cuda-bindings "
            "nvidia-cuda-nvrtc, which zllm's extra [cuda] brings"
        ) from error
    return nvrtc  # type: ignore[no-any-return]


def nvrtc_version() -> tuple[int, int]:
    """NVRTC's version, (major, minor)."""
    _, major, minor = load_nvrtc().nvrtcVersion()
    return major, minor


def find_headers() -> Path:
    """The folder that holds CUDA's `cuda_fp16.h`; KernelError with the remedy when none does."""
    candidates: list[Path] = []
    try:
        from cuda.pathfinder import find_nvidia_header_directory

        found = find_nvidia_header_directory("cudart")
        if found is not None:
            candidates.append(Path(found))
    except ImportError:
        pass
    import torch

    packages = Path(torch.__file__).parent.parent
    candidates += [packages / "nvidia/cu13/include", packages / "torch/include"]
    for folder in candidates:
        if (folder / "cuda_fp16.h").is_file():
            return folder
    raise KernelError(
        f"CUDA's headers are missing (cuda_fp16.h in {', '.join(map(str, candidates))}): "
        "pip install nvidia-cuda-runtime brings them"
    )


def device_arch(device: int | None = None) -> str:
    """The architecture to compile for: `sm_90a` on Hopper, whose wgmma needs the `a`."""
    import torch

    if not torch.cuda.is_available():
        raise KernelError("no GPU that torch can use: `zllm doctor` says what is missing")
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise KernelError(
            f"the GPU is of compute capability {major}.{minor}: zllm's kernels need 8.0 or newer"
        )
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def default_cache_dir() -> Path:
    """`$ZLLM_KERNEL_CACHE`, or `zllm/kernels` in the user's cache folder."""
    if chosen := os.environ.get("ZLLM_KERNEL_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "zllm" / "kernels"


class Compiler:
    """Compiles programs of `root`/kernels for one architecture. Safe to use from threads."""

    def __init__(
        self,
        arch: str | None = None,
        cache_dir: Path | None = None,
        root: Path = Path(__file__).parent,
    ) -> None:
        """`arch`: such as sm_80; None is the current device's. `root`: kernels/ and include/."""
        self.arch = arch or device_arch()
        self.cache_dir: Path | None = cache_dir or default_cache_dir()
        self.root = root
        self.compiled = 0
        """Programs that NVRTC had to compile: those that the cache did not hold."""
        self._nvrtc = load_nvrtc()
        self._lock = threading.Lock()

    def compile(self, source: str, defines: Mapping[str, str | int] | None = None) -> bytes:
        """The cubin of `kernels/source`; KernelError with NVRTC's log (file and line) if none."""
        path = self.root / "kernels" / source
        try:
            text = path.read_text()
        except OSError as error:
            raise KernelError(f"source: {source} cannot be read: {error}") from error
        options = [f"--gpu-architecture={self.arch}", *_OPTIONS]
        options += [f"-D{name}={value}" for name, value in sorted((defines or {}).items())]
        key = self._key(text, options)
        cubin = self._load(key)
        if cubin is None:
            cubin = self._run_nvrtc(text, str(path), options)
            self._store(key, cubin)
        return cubin

    def compile_many(
        self,
        programs: Iterable[Program],
        progress: Progress | None = None,
        workers: int | None = None,
    ) -> None:
        """Bring all programs into the cache, several at a time: NVRTC runs without the GIL."""
        todo = list(programs)
        with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
            futures = {pool.submit(self.compile, p.source, p.defines): p.source for p in todo}
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                if progress is not None:
                    progress(done, len(todo), futures[future])

    def _key(self, text: str, options: list[str]) -> str:
        digest = hashlib.sha256(repr((nvrtc_version(), options)).encode())
        pending, seen = [text], set()
        while pending:
            current = pending.pop()
            digest.update(current.encode())
            for name in _INCLUDE.findall(current):
                header = self.root / "include" / name
                if name not in seen and header.is_file():
                    seen.add(name)
                    pending.append(header.read_text())
        return digest.hexdigest()

    def _file(self, key: str) -> Path | None:
        return self.cache_dir / self.arch / f"{key}.cubin" if self.cache_dir else None

    def _load(self, key: str) -> bytes | None:
        file = self._file(key)
        try:
            data = file.read_bytes() if file else b""
        except OSError:
            return None
        digest, cubin = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        # A disk that filled up or lost power may leave a file that is not what was written.
        return cubin if cubin and hashlib.sha256(cubin).digest() == digest else None

    def _store(self, key: str, cubin: bytes) -> None:
        file = self._file(key)
        if file is None:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
                temporary.write(hashlib.sha256(cubin).digest() + cubin)
            os.replace(temporary.name, file)
        except OSError as error:
            with self._lock:
                if self.cache_dir is not None:
                    _log.warning(
                        "kernel cache %s cannot be written (%s): every start will compile; "
                        "set ZLLM_KERNEL_CACHE to a folder that can",
                        self.cache_dir,
                        error,
                    )
                self.cache_dir = None

    def _run_nvrtc(self, text: str, name: str, options: list[str]) -> bytes:
        nvrtc = self._nvrtc
        folders = (self.root / "include", find_headers())
        arguments = [option.encode() for option in options]
        arguments += [f"--include-path={folder}".encode() for folder in folders]
        status, program = nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], [])
        self._check(status, f"{name}: no program")
        try:
            (status,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
            _, size = nvrtc.nvrtcGetProgramLogSize(program)
            log = bytearray(size)
            nvrtc.nvrtcGetProgramLog(program, log)
            message = log.strip(b"\0\n ").decode(errors="replace")
            if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
                raise KernelError(f"{name} does not compile for {self.arch}:\n{message}")
            if message:
                # Such as products of wgmma that have to wait for one another: slow, and yet right.
                _log.warning("%s for %s: %s", name, self.arch, message)
            status, size = nvrtc.nvrtcGetCUBINSize(program)
            self._check(status, f"{name}: no cubin")
            cubin = bytearray(size)
            self._check(nvrtc.nvrtcGetCUBIN(program, cubin)[0], f"{name}: no cubin")
        finally:
            nvrtc.nvrtcDestroyProgram(program)
        with self._lock:
            self.compiled += 1
        return bytes(cubin)

    def _check(self, status: int, what: str) -> None:
        if status != self._nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelError(f"{what}: NVRTC says {self._nvrtc.nvrtcGetErrorString(status)[1]!r}")
