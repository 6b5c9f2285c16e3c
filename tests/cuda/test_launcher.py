"""Arguments, streams, graphs and dependent launches of a kernel written here."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from zllm.cuda.compiler import Compiler
from zllm.cuda.launcher import Int64, KernelLibrary
from zllm.errors import KernelError

pytestmark = pytest.mark.gpu

SOURCE = """
struct Pair { int first, second; };
extern "C" __global__ void store(double* out, const float* x, int a, long long b, float c,
                                 short d, Pair e, const int* nothing) {
  out[0] = x[1]; out[1] = a; out[2] = double(b); out[3] = c;
  out[4] = d; out[5] = e.first; out[6] = e.second; out[7] = nothing == nullptr;
}
extern "C" __global__ void add_one(int* x, int n) {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) ++x[i];
}
extern "C" __global__ void touch_shared(int* x, int words) {
  extern __shared__ int memory[];
  memory[words - 1] = 5;
  x[0] = memory[words - 1];
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    root = tmp_path_factory.mktemp("sources")
    (root / "kernels").mkdir()
    source = SOURCE
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        source = "\n".join(line for line in source.splitlines() if "griddepcontrol" not in line)
    (root / "kernels/probe.cu").write_text(source)
    return KernelLibrary(Compiler(cache_dir=root / "cache", root=Path(root)))


def test_the_device_tells_of_itself_small(library: KernelLibrary) -> None:
    assert library.device_attribute("MULTIPROCESSOR_COUNT") == library.num_sms
    per_sm = library.device_attribute("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR")
    assert library.device_attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN") < per_sm


def test_every_kind_of_argument_arrives_small(library: KernelLibrary) -> None:
    out = torch.zeros(8, dtype=torch.float64, device="cuda")
    x = torch.tensor([1.5, 2.5], device="cuda")
    pair = bytes((ctypes.c_int * 2)(11, 12))
    args = (out, x, -3, Int64(1 << 40), 0.5, ctypes.c_short(-9), pair, None)
    library.get("probe.cu", "store").launch((1, 1, 1), (1, 1, 1), args)
    assert out.tolist() == [2.5, -3, float(1 << 40), 0.5, -9, 11, 12, 1]


def test_a_kernel_is_loaded_once(library: KernelLibrary) -> None:
    assert library.get("probe.cu", "store") is library.get("probe.cu", "store")


@pytest.mark.parametrize("pdl", [False, True])
def test_launches_follow_one_another_in_streams_and_graphs_small(
    library: KernelLibrary, pdl: bool
) -> None:
    kernel = library.get("probe.cu", "add_one")
    n, pdl = 100_000, pdl and library.pdl
    x = torch.zeros(n, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()

    def chain() -> None:
        for _ in range(20):
            kernel.launch((-(-n // 256), 1, 1), (256, 1, 1), (x, n), pdl=pdl)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain()
    stream.synchronize()
    assert x.eq(20).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    graph.replay()
    graph.replay()
    assert x.eq(60).all()


def test_shared_memory_beyond_48_kib_small(library: KernelLibrary) -> None:
    x = torch.zeros(1, dtype=torch.int32, device="cuda")
    kernel = library.get("probe.cu", "touch_shared")
    kernel.launch((1, 1, 1), (1, 1, 1), (x, 16 * 1024), shared_bytes=64 * 1024)
    assert x.item() == 5
    with pytest.raises(KernelError, match="shared memory: CUDA_ERROR_INVALID_VALUE"):
        kernel.launch((1, 1, 1), (1, 1, 1), (x, 1), shared_bytes=1 << 20)


def test_an_empty_grid_launches_nothing(library: KernelLibrary) -> None:
    x = torch.zeros(1, dtype=torch.int32, device="cuda")
    library.get("probe.cu", "add_one").launch((0, 1, 1), (256, 1, 1), (x, 1))
    assert x.item() == 0


def test_what_cannot_launch_is_said(library: KernelLibrary) -> None:
    x = torch.zeros(1, dtype=torch.int32, device="cuda")
    kernel = library.get("probe.cu", "add_one")
    with pytest.raises(KernelError, match=r"add_one did not launch.*4096"):
        kernel.launch((1, 1, 1), (4096, 1, 1), (x, 1))
    with pytest.raises(KernelError, match="argument of type str"):
        kernel.launch((1, 1, 1), (1, 1, 1), (x, "1"))
    with pytest.raises(KernelError, match="does not fit"):
        kernel.launch((1, 1, 1), (1, 1, 1), (x, 1 << 40))
    with pytest.raises(KernelError, match="nothing: not in the cubin"):
        library.get("probe.cu", "nothing")
