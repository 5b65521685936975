"""Staging: preallocated host buffers that a tensor is copied into on the engine's thread.

A :class:`Ring` holds buffers of one shape and type, one after another in memory, so that the
background thread can work on many steps in one call. Taking, filling and giving back a buffer
allocates nothing; a CUDA tensor is copied asynchronously on the engine's current stream, and an
event tells the background thread when the copy is done. torch is never imported here: it is used
only where the engine already has.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any, NamedTuple

import numpy as np

from eplb_dump.format.schema import Status

# Not ctypes.memmove, which gives up the interpreter lock for the copy's microseconds: a thread that
# gives it up and takes it back at once, every step, starves the one that waits for it.
_memmove = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes._memmove_addr  # type: ignore[attr-defined]
)


class StagingError(ValueError):
    """A tensor that cannot be staged; the text is the reason that the step is rejected for."""


class Ring:
    """``count`` buffers for tensors like ``example``, used and released in order.

    One thread takes (the engine's) and one releases (the background thread); neither waits for the
    other, as each writes counters of its own.

    Attributes:
        host: numpy array ``[count, layers, physical]``, all buffers.
    """

    __slots__ = (
        "_addresses",
        "_base",
        "_bytes",
        "_current_stream",
        "_device",
        "_dtype",
        "_events",
        "_plain",
        "_released",
        "_streams",
        "_taken",
        "_targets",
        "count",
        "host",
        "is_torch",
        "shape",
        "slot_bytes",
    )

    def __init__(self, example: Any, count: int) -> None:
        """Raises StagingError where the example is not an integer tensor of two dimensions."""
        torch = sys.modules.get("torch")
        self.is_torch = torch is not None and isinstance(example, torch.Tensor)
        if not self.is_torch and not isinstance(example, np.ndarray):
            raise StagingError(f"neither a torch tensor nor a numpy array but {type(example).__name__}")
        if example.ndim != 2 or 0 in example.shape:
            raise StagingError(f"of shape {tuple(example.shape)}, not [layers, physical experts]")
        self.count = count
        self.shape = example.shape
        self._dtype = example.dtype
        self._device: Any = None
        self._current_stream: Any = None
        self._events: list[Any] = []
        #: The stream that each event was last recorded on.
        self._streams: list[int] = []
        self._bytes: list[memoryview] = []
        self._addresses: list[int] = []
        self._plain: Any = None
        self._taken = self._released = self._base = 0
        if self.is_torch:
            self._allocate_torch(torch, example)
        else:
            if self._dtype.kind not in "iu" or not self._dtype.isnative:
                raise StagingError(f"of type {self._dtype}, not an integer type")
            self.host = np.empty((count, *self.shape), self._dtype)
            self._targets = list(self.host)
            self._bytes = [memoryview(buffer).cast("B") for buffer in self.host]
        self.slot_bytes = max(1, self.host.nbytes // max(1, count))

    def _allocate_torch(self, torch: Any, example: Any) -> None:
        if example.dtype.is_floating_point or example.dtype.is_complex or example.dtype == torch.bool:
            raise StagingError(f"of type {example.dtype}, not an integer type")
        if example.layout != torch.strided or example.device.type == "meta":
            raise StagingError(f"of layout {example.layout} on {example.device}")
        self._device = example.device
        on_gpu = self._device.type == "cuda"
        # Buffers made under inference_mode could not be written outside of it.
        with torch.inference_mode(False):
            block = torch.empty((self.count, *self.shape), dtype=self._dtype, pin_memory=on_gpu)
            self.host = block.numpy()
            self._targets = list(block)
        if self._device.type == "cpu":
            self._plain = torch.Tensor
            self._addresses = [buffer.data_ptr() for buffer in self._targets]
        if on_gpu:
            # blocking: the background thread sleeps until the event instead of spinning.
            self._events = [torch.cuda.Event(blocking=True) for _ in range(self.count)]
            self._streams = [0] * self.count
            self._current_stream = torch.cuda.current_stream

    # ---- the engine's thread

    def fits(self, tensor: Any) -> bool:
        return bool(
            tensor.shape == self.shape
            and tensor.dtype == self._dtype
            and (not self.is_torch or tensor.device == self._device)
        )

    @property
    def used(self) -> int:
        return self._taken - self._released

    def take(self) -> int:
        """The index of a free buffer, or -1 where all are in use."""
        used = self._taken - self._released
        if used >= self.count:
            return -1
        if not used:  # begin anew, with the buffers that are still in the processor's cache
            self._base = self._taken
        index = (self._taken - self._base) % self.count
        self._taken += 1
        return index

    def untake(self) -> None:
        """Give back the buffer taken last, unused."""
        self._taken -= 1

    def fill(self, index: int, tensor: Any) -> None:
        """Begin to copy a tensor that fits. Never waits for a device."""
        if self.is_torch:
            # A subclass may keep its numbers elsewhere, and a null pointer stands for no memory.
            if self._addresses and type(tensor) is self._plain and tensor.is_contiguous():
                address = tensor.data_ptr()
                if address:
                    _memmove(self._addresses[index], address, self.slot_bytes)
                    return
            self._targets[index].copy_(tensor, non_blocking=True)
        elif tensor.flags.c_contiguous:
            self._bytes[index][:] = tensor.data.cast("B")
        else:
            np.copyto(self._targets[index], tensor)

    def mark(self, index: int) -> None:
        """Note on the stream that all copies so far are done by then (CUDA only)."""
        if self._events:
            stream = self._current_stream(self._device)
            self._events[index].record(stream)
            self._streams[index] = stream.cuda_stream

    # ---- the background thread

    def wait(self, first: int, last: int) -> None:
        """Wait until buffers ``first`` to ``last`` are filled, without the interpreter lock."""
        if self._events:
            # A stream works in order, so its last event stands for all of its.
            done: set[int] = set()
            for index in range(last, first - 1, -1):
                if self._streams[index] not in done:
                    done.add(self._streams[index])
                    self._events[index].synchronize()

    def release(self, count: int) -> None:
        """Give back the ``count`` buffers taken longest ago."""
        self._released += count


def slot_bytes(example: Any) -> int:
    """Bytes of one buffer for tensors like ``example`` (0 where it is no tensor at all)."""
    try:
        return int(example.nbytes)
    except Exception:  # whatever an object answers to that
        return 0


def _root(tensor: Any) -> Any:
    return tensor if tensor._base is None else tensor._base


class ChangeDetector:
    """Tells, without reading it, that a tensor certainly is what it was at the last look.

    torch counts in-place writes in a version counter that views share. numpy arrays and inference
    tensors have none, so they always may have changed.
    """

    __slots__ = ("_last", "_version")

    def __init__(self) -> None:
        self._last: Any = None
        self._version: int | None = None

    def unchanged(self, tensor: Any) -> bool:
        if self._version is None:
            return False
        last = self._last
        if tensor is not last and not self._same_storage(tensor, last):
            return False
        return bool(tensor._version == self._version)

    @staticmethod
    def _same_storage(tensor: Any, last: Any) -> bool:
        # The last tensor is kept alive here, so that its memory cannot have become another's.
        return (
            type(tensor) is type(last)
            and not tensor.is_inference()
            # Only views of one tensor count their versions together: .data and from_numpy do not.
            and _root(tensor) is _root(last)
            and tensor.data_ptr() == last.data_ptr()
            and tensor.shape == last.shape
            and tensor.dtype == last.dtype
            and tensor.stride() == last.stride()
        )

    def remember(self, tensor: Any) -> None:
        self._last = tensor
        self._version = self.version(tensor)

    @staticmethod
    def version(tensor: Any) -> int | None:
        if isinstance(tensor, np.ndarray):
            return None
        try:
            return int(tensor._version)
        except RuntimeError:  # an inference tensor
            return None


class Entry(NamedTuple):
    """One step on its way from the engine's thread to the journal."""

    step: int
    time_ns: int
    monotonic_ns: int
    status: Status
    num_tokens: int
    phase: str | None
    ep_size: int
    #: The buffers that hold the load and the placement, where there is one.
    load: tuple[Ring, int] | None
    placement: tuple[Ring, int] | None
