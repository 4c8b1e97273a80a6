"""Memory of a GPU as two processes share it: allocated, exported, mapped and copied into by CUDA's driver.

Why the driver's C interface, and neither torch's sharing of storages nor libcudart: torch's passes the name of a file
that holds a counter, which we would open and count down because a peer says so; the form of its handles changes between
releases; and memory that a peer dies with, uncounted, is kept for ever. libcudart has another name with every major
version and may be linked into torch. libcuda.so.1 has one name, and entry points that stay.

The context is the one that torch uses, the device's primary one, made current for the calling thread before each call:
so any thread may call. Failed calls leave no error behind for torch to find. Copies go to the thread's current stream
of the device and are waited for there; no call here waits for another stream, but that giving memory back may.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Protocol

import torch
from torch import Tensor

from distserve.transfer.errors import LaneFailed

HANDLE_BYTES = 64
GRANULE = 2 << 20
"""Allocations are whole granules: a smaller one may be a part of memory that would be exported with it."""

_LAZY_PEER_ACCESS = 1
_RANGE_SIZE, _RANGE_START = 12, 11  # CUpointer_attribute
_PORTABLE = 1


class DeviceMemory(Protocol):
    """What a lane needs of one device. Addresses are the device's; every call may raise LaneFailed with a sentence."""

    def allocate(self, nbytes: int) -> int: ...

    def free(self, address: int) -> None: ...

    def export(self, address: int) -> bytes:
        """The handle by which another process maps an allocation."""

    def map(self, handle: bytes) -> int:
        """Another process's allocation, here; to be given back by ``unmap``."""

    def unmap(self, address: int) -> None: ...

    def extent(self, address: int) -> int:
        """Bytes from ``address`` to the end of what was allocated or mapped there."""

    def view(self, address: int, nbytes: int) -> Tensor:
        """Flat uint8 over memory of this device; who drops the memory first drops its views."""

    def copy(self, target: int, source: Tensor, nbytes: int) -> None:
        """Copy from the front of ``source``; returns when the bytes are there for every process that maps them."""

    def write(self, target: int, data: bytes) -> None: ...

    def read(self, source: int, nbytes: int) -> bytes: ...


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


class _Span:
    """Device memory in the form that torch takes without copying (numba's CUDA array interface, version 3)."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


class CudaMemory:
    """Of one device of this process. Thread-safe: it holds nothing but the device's context."""

    def __init__(self, index: int) -> None:
        """LaneFailed where there is no driver."""
        self._device = torch.device("cuda", index)
        self._driver = _driver()
        self._context = ctypes.c_void_p()
        number = ctypes.c_int()
        self._check("cuInit", self._driver.cuInit(0))
        self._check("cuDeviceGet", self._driver.cuDeviceGet(ctypes.byref(number), index))
        retained = self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), number)  # as long as torch does
        self._check("cuDevicePrimaryCtxRetain", retained)

    def allocate(self, nbytes: int) -> int:
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), -(-nbytes // GRANULE) * GRANULE)
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", address)

    def export(self, address: int) -> bytes:
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        return bytes(handle.reserved)

    def map(self, handle: bytes) -> int:
        if len(handle) != HANDLE_BYTES:
            raise LaneFailed(f"the peer's handle of its device memory has {len(handle)} bytes, not {HANDLE_BYTES}")
        address = ctypes.c_uint64()
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), _Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS)
        return address.value

    def unmap(self, address: int) -> None:
        self._call("cuIpcCloseMemHandle", address)

    def extent(self, address: int) -> int:
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        try:
            self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
        except LaneFailed:  # told of memory of this context; the attributes are told of any address
            self._call("cuPointerGetAttribute", ctypes.byref(base), _RANGE_START, address)
            self._call("cuPointerGetAttribute", ctypes.byref(size), _RANGE_SIZE, address)
        return base.value + size.value - address

    def view(self, address: int, nbytes: int) -> Tensor:
        self._bind()
        try:
            found = torch.as_tensor(_Span(address, nbytes), device=self._device)
        except (RuntimeError, ValueError, TypeError) as error:
            raise LaneFailed(f"torch does not take memory of {self._device}: {str(error).splitlines()[0]}") from None
        if found.data_ptr() != address:
            raise LaneFailed(f"torch sees memory of {self._device} on another device")
        return found

    def copy(self, target: int, source: Tensor, nbytes: int) -> None:
        self._on_stream("cuMemcpyAsync", target, source.data_ptr(), nbytes)

    def write(self, target: int, data: bytes) -> None:
        self._on_stream("cuMemcpyHtoDAsync_v2", target, data, len(data))

    def read(self, source: int, nbytes: int) -> bytes:
        data = ctypes.create_string_buffer(nbytes)
        self._on_stream("cuMemcpyDtoHAsync_v2", data, source, nbytes)
        return data.raw

    def lock_pages(self, address: int, nbytes: int) -> None:
        """Page-lock memory of the host, so that copies of it neither wait nor pass through a buffer."""
        self._call("cuMemHostRegister_v2", address, nbytes, _PORTABLE)

    def unlock_pages(self, address: int) -> None:
        self._call("cuMemHostUnregister", address)

    def _on_stream(self, name: str, *arguments: object) -> None:
        """A copy on this thread's stream, and its end."""
        stream = torch.cuda.current_stream(self._device)
        self._call(name, *arguments, stream.cuda_stream)
        try:
            stream.synchronize()
        except RuntimeError as error:
            raise LaneFailed(f"a copy of device memory failed: {str(error).splitlines()[0]}") from None

    def _call(self, name: str, *arguments: object) -> None:
        self._bind()
        self._check(name, getattr(self._driver, name)(*arguments))

    def _bind(self) -> None:
        self._check("cuCtxSetCurrent", self._driver.cuCtxSetCurrent(self._context))

    def _check(self, name: str, code: int) -> None:
        if code:
            words = ctypes.c_char_p()
            self._driver.cuGetErrorName(code, ctypes.byref(words))
            raise LaneFailed(f"CUDA answered {name} with {(words.value or str(code).encode()).decode()}")


_ADDRESS, _SIZE, _POINTER = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p
_CALLS: dict[str, tuple[object, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(_POINTER), ctypes.c_int),
    "cuCtxSetCurrent": (_POINTER,),
    "cuMemAlloc_v2": (ctypes.POINTER(_ADDRESS), _SIZE),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemGetAddressRange_v2": (ctypes.POINTER(_ADDRESS), ctypes.POINTER(_SIZE), _ADDRESS),
    "cuPointerGetAttribute": (_POINTER, ctypes.c_int, _ADDRESS),
    "cuIpcGetMemHandle": (ctypes.POINTER(_Handle), _ADDRESS),
    "cuIpcOpenMemHandle_v2": (ctypes.POINTER(_ADDRESS), _Handle, ctypes.c_uint),
    "cuIpcCloseMemHandle": (_ADDRESS,),
    "cuMemcpyAsync": (_ADDRESS, _ADDRESS, _SIZE, _POINTER),
    "cuMemcpyHtoDAsync_v2": (_ADDRESS, ctypes.c_char_p, _SIZE, _POINTER),
    "cuMemcpyDtoHAsync_v2": (_POINTER, _ADDRESS, _SIZE, _POINTER),
    "cuMemHostRegister_v2": (_POINTER, _SIZE, ctypes.c_uint),
    "cuMemHostUnregister": (_POINTER,),
    "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}


@functools.cache
def _driver() -> ctypes.CDLL:
    """The driver's library with the calls that we make; LaneFailed where it is not, or is too old."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        for name, arguments in _CALLS.items():
            call = getattr(library, name)
            call.argtypes, call.restype = arguments, ctypes.c_int
    except (OSError, AttributeError) as error:
        raise LaneFailed(f"CUDA's driver cannot be used: {error}") from None
    return library


@functools.cache
def _cuda_memory(index: int) -> CudaMemory:
    return CudaMemory(index)


def cuda_memory(device: torch.device) -> CudaMemory:
    """The memory of a GPU; LaneFailed when ``device`` is none."""
    if device.type != "cuda":
        raise LaneFailed(f"the KV here is on {device}, not on a GPU")
    return _cuda_memory(torch.cuda.current_device() if device.index is None else device.index)


def gpu_of(device: torch.device) -> str:
    """Names the GPU among all; empty when ``device`` is none."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
