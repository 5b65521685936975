"""How a CUDA device is asked to copy to the host, and to say when it is done and how long it took.

:class:`Driver` calls the CUDA driver. That costs the engine's thread a quarter of torch's own calls, and it
keeps the interpreter lock: a thread that releases the lock in every step and takes it back at once starves
the background thread, which waits for it. :class:`Torch` does the same with torch's public calls, where there
is no CUDA driver (ROCm) or this torch lacks what the other one needs.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any, Protocol

_ADDRESS, _SIZE = ctypes.c_void_p, ctypes.c_size_t
#: Who waits for the event sleeps instead of spinning.
_BLOCKING_SYNC = 1


class Device(Protocol):
    """A device on which the engine's thread queues copies and events. None of it waits for the device.

    Attributes:
        copy: copies bytes on the device into page-locked memory: target address, source address, size. On
            the current stream. None: torch's ``copy_`` is to be used.
    """

    @property
    def copy(self) -> Callable[[int, int, int], None] | None: ...

    def stream(self) -> Any:
        """The stream on which the engine works now; streams can be compared and hashed."""

    def new_event(self) -> Any:
        """An event with timing. There are two for each buffer, which live as long as the process."""

    def record(self, event: Any, stream: Any) -> None:
        """Queue an event."""

    def wait(self, event: Any) -> None:
        """Sleep until the event has happened, without the interpreter lock. On the background thread."""

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """The time between two events. Raises if one of them cannot be read."""

    def keep_lock(self, keep: bool) -> None:
        """Whether calls of the engine's thread keep the interpreter lock, if the device can choose."""


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

    copy: None = None

    def __init__(self, device: Any) -> None:
        torch: Any = sys.modules["torch"]
        self._device = device
        self._cuda = torch.cuda

    def stream(self) -> Any:
        return self._cuda.current_stream(self._device)

    def new_event(self) -> Any:
        # blocking: who waits for it sleeps instead of spinning.
        return self._cuda.Event(enable_timing=True, blocking=True)

    def record(self, event: Any, stream: Any) -> None:
        event.record(stream)

    def wait(self, event: Any) -> None:
        event.synchronize()

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end))

    def keep_lock(self, keep: bool) -> None:
        pass


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

    def __init__(self, index: int) -> None:
        torch: Any = sys.modules["torch"]
        self._index = index
        self._current_stream = torch._C._cuda_getCurrentRawStream
        self._current_device = torch._C._cuda_getDevice
        self._on_device = torch.cuda.device
        self._keeping, self._releasing = (
            _Calls(kind("libcuda.so.1")) for kind in (ctypes.PyDLL, ctypes.CDLL)
        )
        self._calls = self._keeping
        context = ctypes.c_void_p()
        with self._on_device(index):
            _check(self._keeping.context(ctypes.byref(context)))
        if not context.value:
            raise RuntimeError("torch has no CUDA context")
        self._context = context.value

    def copy(self, target: int, source: int, size: int) -> None:
        if self._current_device() == self._index:
            _check(self._calls.copy(target, source, size, self._current_stream(self._index)))
        else:
            with self._on_device(self._index):
                _check(self._calls.copy(target, source, size, self._current_stream(self._index)))

    def stream(self) -> int:
        stream: int = self._current_stream(self._index)
        return stream

    def new_event(self) -> int:
        event = ctypes.c_void_p()
        _check(self._keeping.create(ctypes.byref(event), _BLOCKING_SYNC))
        assert event.value is not None
        return event.value

    def record(self, event: int, stream: int) -> None:
        _check(self._calls.record(event, stream))

    def wait(self, event: int) -> None:
        _check(self._keeping.enter(self._context))  # of this thread, which has none
        _check(self._releasing.wait(event))

    def elapsed_ms(self, start: int, end: int) -> float:
        took = ctypes.c_float()
        _check(self._keeping.elapsed(ctypes.byref(took), start, end))
        return took.value

    def keep_lock(self, keep: bool) -> None:
        self._calls = self._keeping if keep else self._releasing


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA driver error {code}")
