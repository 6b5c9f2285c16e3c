"""Launches kernels through cuda-python on torch's current stream.

A launch packs its arguments into one buffer that lives as long as the kernel: the driver copies
them before it returns. A Kernel is therefore used by one thread at a time.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from zllm.cuda.compiler import Compiler, Program, Progress
from zllm.errors import KernelError

try:
    from cuda.bindings import driver
except ImportError:  # said by Compiler, with the remedy, before any kernel can exist
    driver = None

Grid = tuple[int, int, int]
_DEFAULT_SHARED_BYTES = 48 * 1024
_TENSOR_MAP_BYTES = 128


class Int64(int):
    """An integer argument that the kernel takes as 64 bits; a plain int is 32."""


def check_status(status: Any, what: str) -> None:
    """Raises KernelError with the driver's words unless a call of it succeeded."""
    if status != driver.CUresult.CUDA_SUCCESS:
        _, name = driver.cuGetErrorName(status)
        _, text = driver.cuGetErrorString(status)
        raise KernelError(f"{what}: {name.decode()} ({text.decode()})")


def _same(value: Any) -> Any:
    return value


def _format_of(kind: type, value: Any) -> tuple[str, Callable[[Any], Any]]:
    """The struct format of an argument, eight-byte aligned, and what turns it into a number."""
    if issubclass(kind, torch.Tensor):
        return "Q", torch.Tensor.data_ptr
    if issubclass(kind, bool):
        return "i4x", int
    if issubclass(kind, Int64):
        return "q", _same
    if issubclass(kind, int):
        return "i4x", _same
    if issubclass(kind, float):
        return "f4x", _same
    if kind is type(None):
        return "Q", lambda _: 0
    if issubclass(kind, bytes):
        if len(value) % 8:
            raise KernelError(f"a kernel argument of {len(value)} bytes: pad it to 8")
        return f"{len(value)}s", _same
    if issubclass(kind, ctypes._SimpleCData):
        size = ctypes.sizeof(kind)
        return f"{size}s{8 - size}x", bytes
    if kind.__name__ == "CUtensorMap":
        return f"{_TENSOR_MAP_BYTES}s", lambda m: ctypes.string_at(m.getPtr(), _TENSOR_MAP_BYTES)
    raise KernelError(f"a kernel argument of type {kind.__name__}")


class _Layout:
    """How arguments of given types lie in a buffer, and the array of their addresses."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        formats, self.readers = [], []
        offsets, offset = [], 0
        for value in args:
            form, reader = _format_of(type(value), value)
            formats.append(form)
            self.readers.append(reader)
            offsets.append(offset)
            offset += struct.calcsize("<" + form)
        self.pack_into = struct.Struct("<" + "".join(formats)).pack_into
        self.buffer = ctypes.create_string_buffer(max(offset, 8))
        base = ctypes.addressof(self.buffer)
        self._pointers = (ctypes.c_void_p * max(len(offsets), 1))(*(base + o for o in offsets))
        self.address = ctypes.addressof(self._pointers)


def _launch_attribute(name: str, field: str, value: int | Grid) -> Any:
    """CU_LAUNCH_ATTRIBUTE_`name`, whose value's `field` is a number or has an x, y and z."""
    attribute = driver.CUlaunchAttribute()
    attribute.id = getattr(driver.CUlaunchAttributeID, f"CU_LAUNCH_ATTRIBUTE_{name}")
    if isinstance(value, int):
        setattr(attribute.value, field, value)
    else:
        size = getattr(attribute.value, field)
        size.x, size.y, size.z = value
    return attribute


def _config_with(attributes: list[Any]) -> Any:
    """A launch's configuration. Assigning its attributes copies them, so that they are complete
    when they are assigned."""
    config = driver.CUlaunchConfig()
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


class Kernel:
    """One function of a cubin, loaded in torch's context of `device`."""

    def __init__(self, cubin: bytes, function: str, device: int) -> None:
        self.function = function
        self.device = device
        torch.cuda.init()
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes the primary context current
            status, self._library = driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0)
            check_status(status, f"{function}: the cubin does not load")
            status, kernel = driver.cuLibraryGetKernel(self._library, function.encode())
            check_status(status, f"{function}: not in the cubin")
            status, self._handle = driver.cuKernelGetFunction(kernel)
            check_status(status, f"{function}: no handle")
        self._max_shared = _DEFAULT_SHARED_BYTES
        self._layouts: dict[tuple[Any, ...], _Layout] = {}
        self._configs: dict[tuple[bool, bool], Any] = {}

    def launch(
        self,
        grid: Grid,
        block: Grid,
        args: tuple[Any, ...],
        *,
        shared_bytes: int = 0,
        pdl: bool = False,
        cooperative: bool = False,
    ) -> None:
        """Launch on torch's current stream of the device. An argument is a Tensor (its address),
        None (a null pointer), int (int32), Int64, float (float32), a ctypes value, bytes or a
        CUtensorMap (by value).

        `pdl` lets the kernel start before the previous one of the stream has ended; it must call
        wait_for_previous() (common.cuh). An empty grid launches nothing.
        """
        if not (grid[0] and grid[1] and grid[2]):
            return
        key = tuple(map(type, args))
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = _Layout(args)
        try:
            layout.pack_into(
                layout.buffer,
                0,
                *[read(a) for read, a in zip(layout.readers, args, strict=True)],
            )
        except struct.error as error:
            raise KernelError(f"{self.function}: an argument does not fit: {error}") from error
        config = self._configs.get((pdl, cooperative)) or self._config(pdl, cooperative)
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block
        if shared_bytes > self._max_shared:
            self._allow_shared(shared_bytes)
        config.sharedMemBytes = shared_bytes
        config.hStream = torch._C._cuda_getCurrentRawStream(self.device)
        (status,) = driver.cuLaunchKernelEx(config, self._handle, layout.address, 0)
        if status:
            shape = f"grid {grid}, block {block}, {shared_bytes} bytes of shared memory"
            check_status(status, f"{self.function} did not launch ({shape})")

    def attribute(self, name: str) -> int:
        """A CU_FUNC_ATTRIBUTE_ of the function, such as NUM_REGS."""
        which = getattr(driver.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{name}")
        status, value = driver.cuFuncGetAttribute(which, self._handle)
        check_status(status, f"{self.function}: {name}")
        return int(value)

    def clusters_at_once(self, size: int, threads: int, shared_bytes: int) -> int:
        """Clusters of `size` thread blocks of it that the device holds."""
        config = _config_with([_launch_attribute("CLUSTER_DIMENSION", "clusterDim", (size, 1, 1))])
        config.gridDimX, config.gridDimY, config.gridDimZ = size, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        self._allow_shared(shared_bytes)
        config.sharedMemBytes = shared_bytes
        status, count = driver.cuOccupancyMaxActiveClusters(self._handle, config)
        check_status(status, f"{self.function}: clusters of {size}")
        return int(count)

    def _allow_shared(self, shared_bytes: int) -> None:
        which = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = driver.cuFuncSetAttribute(self._handle, which, shared_bytes)
        check_status(status, f"{self.function}: {shared_bytes} bytes of shared memory")
        self._max_shared = shared_bytes

    def _config(self, pdl: bool, cooperative: bool) -> Any:
        attributes = []
        if pdl:
            field = "programmaticStreamSerializationAllowed"
            attributes.append(_launch_attribute("PROGRAMMATIC_STREAM_SERIALIZATION", field, 1))
        if cooperative:
            attributes.append(_launch_attribute("COOPERATIVE", "cooperative", 1))
        config = self._configs[pdl, cooperative] = _config_with(attributes)
        return config


class KernelLibrary:
    """The kernels of one device, compiled and loaded when first asked for."""

    def __init__(self, compiler: Compiler | None = None, device: int | None = None) -> None:
        self.device = torch.cuda.current_device() if device is None else device
        self.compiler = compiler or Compiler()
        properties = torch.cuda.get_device_properties(self.device)
        self.num_sms: int = properties.multi_processor_count
        self.pdl = properties.major >= 9
        """Whether the device knows programmatic dependent launch."""
        self.hopper = (properties.major, properties.minor) == (9, 0)
        """Whether it has wgmma."""
        self._kernels: dict[tuple[Any, ...], Kernel] = {}
        self._clusters: dict[int, int] = {}

    def device_attribute(self, name: str) -> int:
        """A CU_DEVICE_ATTRIBUTE_ of the device, such as MULTIPROCESSOR_COUNT. Our oldest torch does
        not show how much shared memory there is."""
        which = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        check_status(driver.cuInit(0)[0], "the driver does not start")
        status, device = driver.cuDeviceGet(self.device)
        check_status(status, f"device {self.device} is not there")
        status, value = driver.cuDeviceGetAttribute(which, device)
        check_status(status, f"device {self.device}: {name}")
        return int(value)

    def clusters_at_once(self, size: int) -> int:
        """Clusters that run at once of `size` blocks that each fill a multiprocessor: those of a
        cluster lie in one group of multiprocessors, and groups differ from device to device."""
        if size not in self._clusters:
            probe = self.get("probe.cu", "probe")
            self._clusters[size] = probe.clusters_at_once(size, 128, 200 * 1024)
        return self._clusters[size]

    def get(
        self, source: str, function: str, defines: Mapping[str, str | int] | None = None
    ) -> Kernel:
        """`function` of `kernels/source`, compiled with the macros `defines` when first asked."""
        key = (source, function, tuple(sorted((defines or {}).items())))
        kernel = self._kernels.get(key)
        if kernel is None:
            cubin = self.compiler.compile(source, defines)
            kernel = self._kernels[key] = Kernel(cubin, function, self.device)
        return kernel

    def prepare(self, programs: Iterable[Program], progress: Progress | None = None) -> None:
        """Compile several programs at once, so that `get` finds them on disk."""
        self.compiler.compile_many(programs, progress)
