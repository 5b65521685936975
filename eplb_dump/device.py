"""How a CUDA device is asked to copy to the host, and to say when it is done and how long it took.

:class:`Driver` calls the CUDA driver. That costs the engine's thread a quarter of torch's own calls, and it
keeps the interpreter lock: a thread that releases the lock in every step and takes it back at once starves
the background thread, which waits for it. :class:`Torch` does the same with torch's public calls, where there
is no CUDA driver (ROCm) or this torch lacks what the other one needs.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any, Protocol

_ADDRESS, _SIZE = ctypes.c_void_p, ctypes.c_size_t
#: Who waits for the event sleeps instead of spinning.
_BLOCKING_SYNC = 1


class Device(Protocol):
    """A device on which the engine's thread queues copies and events. None of it waits for the device.

    Attributes:
        copies_by_address: whether there is :meth:`copy`; else torch's ``copy_`` is to be used.
        keeps_lock: whether calls of the engine's thread keep the interpreter lock, if the device can choose.
    """

    copies_by_address: bool
    keeps_lock: bool

    def copy(self, target: int, source: int, size: int, event: Any) -> Any:
        """Copy bytes on the device into page-locked memory, with an event behind it if one is given.

        On the current stream, which is returned.
        """

    def stream(self) -> Any:
        """The stream on which the engine works now; streams can be compared and hashed."""

    def new_event(self) -> Any:
        """An event with timing. There are two for each buffer, which live as long as the process."""

    def record(self, event: Any, stream: Any) -> None:
        """Queue an event."""

    def mark(self, event: Any) -> Any:
        """Queue an event on the current stream, which is returned."""

    def wait(self, event: Any) -> None:
        """Sleep until the event has happened, without the interpreter lock. On the background thread."""

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """The time between two events. Raises if one of them cannot be read."""


def device_of(tensor: Any) -> Device | None:
    """The device of a torch tensor; None if its tensors are copied at once (the CPU)."""
    if tensor.device.type != "cuda":
        return None
    found = _devices.get(tensor.device)
    if found is None:
        torch: Any = sys.modules["torch"]
        try:
            found = Torch(tensor.device) if torch.version.cuda is None else Driver(tensor.device.index)
        except (OSError, AttributeError, RuntimeError):
            found = Torch(tensor.device)
        _devices[tensor.device] = found
    return found


_devices: dict[Any, Device] = {}


class Torch:
    """torch's public calls."""

    copies_by_address = False

    def __init__(self, device: Any) -> None:
        self.keeps_lock = False
        torch: Any = sys.modules["torch"]
        self._device = device
        self._cuda = torch.cuda

    def copy(self, target: int, source: int, size: int, event: Any) -> Any:
        raise NotImplementedError

    def stream(self) -> Any:
        return self._cuda.current_stream(self._device)

    def new_event(self) -> Any:
        # blocking: who waits for it sleeps instead of spinning.
        return self._cuda.Event(enable_timing=True, blocking=True)

    def record(self, event: Any, stream: Any) -> None:
        event.record(stream)

    def mark(self, event: Any) -> Any:
        stream = self._cuda.current_stream(self._device)
        event.record(stream)
        return stream

    def wait(self, event: Any) -> None:
        event.synchronize()

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end))


class _Calls:
    """The driver's functions, called with the interpreter lock (``ctypes.PyDLL``) or without it."""

    def __init__(self, library: Any) -> None:
        def function(name: str, *arguments: Any) -> Any:
            found = getattr(library, name)
            found.argtypes, found.restype = arguments, ctypes.c_int
            return found

        self.copy = function("cuMemcpyDtoHAsync_v2", _ADDRESS, ctypes.c_uint64, _SIZE, _ADDRESS)
        self.record = function("cuEventRecord", _ADDRESS, _ADDRESS)
        self.wait = function("cuEventSynchronize", _ADDRESS)
        self.elapsed = function("cuEventElapsedTime", ctypes.POINTER(ctypes.c_float), _ADDRESS, _ADDRESS)
        self.create = function("cuEventCreate", ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint)
        self.context = function("cuCtxGetCurrent", ctypes.POINTER(ctypes.c_void_p))
        self.enter = function("cuCtxSetCurrent", _ADDRESS)


class Driver:
    """The CUDA driver, which torch has loaded.

    A call waits if the stream holds more work than the driver can queue. Whatever is needed to get that work
    done must then be able to take the interpreter lock, so it is kept only while the device keeps up.

    Raises OSError, AttributeError or RuntimeError if this driver or this torch lacks something.
    """

    copies_by_address = True

    def __init__(self, index: int) -> None:
        self.keeps_lock = True
        torch: Any = sys.modules["torch"]
        self._index = index
        self._current_stream = torch._C._cuda_getCurrentRawStream
        self._current_device = torch._C._cuda_getDevice
        self._on_device = torch.cuda.device
        self._keeping, self._releasing = (
            _Calls(kind("libcuda.so.1")) for kind in (ctypes.PyDLL, ctypes.CDLL)
        )
        context = ctypes.c_void_p()
        with self._on_device(index):
            _check(self._keeping.context(ctypes.byref(context)))
        if not context.value:
            raise RuntimeError("torch has no CUDA context")
        self._context = context.value

    def copy(self, target: int, source: int, size: int, event: int | None) -> int:
        calls = self._keeping if self.keeps_lock else self._releasing
        stream: int = self._current_stream(self._index)
        if (
            not stream and self._current_device() != self._index
        ):  # 0 is the default stream of the current device
            with self._on_device(self._index):
                code = calls.copy(target, source, size, 0) or (event and calls.record(event, 0))
        else:
            code = calls.copy(target, source, size, stream) or (event and calls.record(event, stream))
        if code:
            raise RuntimeError(f"CUDA driver error {code}")
        return stream

    def stream(self) -> int:
        stream: int = self._current_stream(self._index)
        return stream

    def new_event(self) -> int:
        event = ctypes.c_void_p()
        _check(self._keeping.create(ctypes.byref(event), _BLOCKING_SYNC))
        assert event.value is not None
        return event.value

    def record(self, event: int, stream: int) -> None:
        _check((self._keeping if self.keeps_lock else self._releasing).record(event, stream))

    def mark(self, event: int) -> int:
        stream: int = self._current_stream(self._index)
        code = (self._keeping if self.keeps_lock else self._releasing).record(event, stream)
        if code:
            raise RuntimeError(f"CUDA driver error {code}")
        return stream

    def wait(self, event: int) -> None:
        _check(self._keeping.enter(self._context))  # of this thread, which has none
        _check(self._releasing.wait(event))

    def elapsed_ms(self, start: int, end: int) -> float:
        took = ctypes.c_float()
        _check(self._keeping.elapsed(ctypes.byref(took), start, end))
        return took.value


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA driver error {code}")
