"""Ring: preallocated host buffers that tensors are copied into on the engine's thread.

The buffers of a ring have one shape and type and follow one another in memory, so that the
background thread can work on many steps in one call. Filling, taking and releasing a buffer
allocates nothing. A CUDA tensor is copied asynchronously on the engine's current stream, and an
event (:mod:`eplb_dump.events`) tells the background thread when the copy is done. torch is never
imported here: it is used only if the engine has imported it.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_dump.device import device_of
from eplb_dump.events import Events

# Not ctypes.memmove, which releases the interpreter lock for the few microseconds of the copy. A thread
# that releases the lock and takes it back at once, in every step, starves the thread that waits for it.
_memmove = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes._memmove_addr  # type: ignore[attr-defined]
)

#: What an engine at 200 steps/s fills of DeepSeek-V3's loads before the background thread has written them.
_TOUCHED_BYTES = 16 << 20
#: Linux's MADV_POPULATE_WRITE, since 5.14: give these pages memory, and leave what they hold.
_POPULATE_WRITE = 23
#: For so many bytes at a time: an engine that maps memory meanwhile waits for some ms, and the background
#: thread waits for the interpreter lock after each, up to 5 ms if the engine does not release it.
_POPULATED_AT_ONCE = 8 << 20


class StagingError(ValueError):
    """A tensor cannot be staged; the text completes "expert_load is ..."."""


class Buffer(NamedTuple):
    """One buffer of a ring. What it holds is in ``ring.host[number]``."""

    ring: Ring
    number: int
    #: How many buffers of the ring have been taken, from the first on, once this one is.
    taken: int


class Ring:
    """``count`` buffers for tensors like ``example``, taken and released in order.

    The engine's thread fills the next free buffer and takes it just before its step is queued; until then
    the buffer stays free, so that a step that fails has nothing to undo. The background thread releases.
    Neither waits for the other: each writes a counter of its own, and sets it instead of adding to it. So a
    buffer that was taken for a step that a signal handler then interrupted is free again once the next
    one is released.

    Attributes:
        host: numpy array ``[count, layers, physical]``, all buffers.
        taken: how many buffers have been taken so far.
        released: how many of them are free again.
        events: of the stream that fills the buffers; None if filling them is done at once (not CUDA).
        many: with so many in use, the background thread should be woken.
        seen, source: the tensor that was copied last, and its address, if it can be copied by address.
    """

    __slots__ = (
        "_addresses",
        "_base",
        "_bytes",
        "_device",
        "_device_calls",
        "_dtype",
        "_has_memory",
        "_last",
        "_last_but_one",
        "_marks",
        "_not_copied",
        "_plain",
        "_targets",
        "count",
        "events",
        "host",
        "is_torch",
        "many",
        "released",
        "seen",
        "shape",
        "slot_bytes",
        "source",
        "taken",
    )

    def __init__(self, example: Any, count: int) -> None:
        """Raises StagingError if the example is not an integer tensor of two dimensions."""
        torch = sys.modules.get("torch")
        self.is_torch = torch is not None and isinstance(example, torch.Tensor)
        if not self.is_torch and not isinstance(example, np.ndarray):
            raise StagingError(f"neither a torch tensor nor a numpy array but {type(example).__name__}")
        if example.ndim != 2 or 0 in example.shape:
            raise StagingError(f"of shape {tuple(example.shape)}, not [layers, physical experts]")
        self.count = count
        self.many = max(1, count // 4)
        self.shape = example.shape
        self._dtype = example.dtype
        self._device: Any = None
        self.events: Events | None = None
        self._bytes: list[memoryview] = []
        self._addresses: list[int] = []
        self._plain: Any = None
        self._device_calls: Any = None
        self.seen: Any = None
        self.source = 0
        #: The last element of each buffer on a device, and a value that no tensor has there.
        self._marks: memoryview | None = None
        self._not_copied = 0
        #: The buffers that were filled last.
        self._last = self._last_but_one = 0
        self.taken = self.released = self._base = 0
        self._has_memory = False
        if self.is_torch:
            self._allocate_torch(torch, example)
        else:
            if self._dtype.kind not in "iu" or not self._dtype.isnative:
                raise StagingError(f"of type {self._dtype}, not an integer type")
            self._allocate_numpy(self._dtype)
            self._targets = list(self.host)
            self._bytes = [memoryview(buffer).cast("B") for buffer in self.host]
        self.slot_bytes = max(1, self.host.nbytes // max(1, count))

    def _allocate_numpy(self, dtype: np.dtype[Any]) -> None:
        # numpy asks for huge pages, torch does not: copies into small ones took 2 to 5 times as long. The
        # first buffers get their memory here, because a copy that waits for a huge page takes up to 5 ms, and
        # the others in :meth:`fill_memory`.
        self.host = np.empty((self.count, *self.shape), dtype)
        self.host[: _TOUCHED_BYTES * self.count // max(1, self.host.nbytes)] = 0

    def _allocate_torch(self, torch: Any, example: Any) -> None:
        if example.dtype.is_floating_point or example.dtype.is_complex or example.dtype == torch.bool:
            raise StagingError(f"of type {example.dtype}, not an integer type")
        if example.layout != torch.strided or example.device.type == "meta":
            raise StagingError(f"of layout {example.layout} on {example.device}")
        self._device = example.device
        device = self._device_calls = device_of(example)
        # A buffer made under inference_mode could not be written outside it.
        with torch.inference_mode(False):
            if device is None:
                self._allocate_numpy(torch.empty(0, dtype=self._dtype).numpy().dtype)
                block = torch.from_numpy(self.host)
            else:
                block = torch.empty((self.count, *self.shape), dtype=self._dtype, pin_memory=True)
                self.host = block.numpy()
            self._targets = list(block)
        if device is not None:
            self.events = Events(self.count, device)
            self._marks = self.host[:, -1, -1].data
            limits = np.iinfo(self.host.dtype)
            self._not_copied = limits.min or limits.max
        if self._device.type == "cpu" if device is None else device.copies_by_address:
            self._plain = torch.Tensor
            self._addresses = [buffer.data_ptr() for buffer in self._targets]

    # ---- the engine's thread. Few calls of Python functions: with cold caches, each takes 1 to 2 µs.

    def fits(self, tensor: Any) -> Any:
        """Whether a tensor has this ring's shape, type and device. Raises whatever the tensor raises.

        An engine hands over the same tensor in every step: if it is ``seen``, at the address ``source``, it
        fits and need not be looked at again, which with cold caches takes longer than the copy.
        """
        if tensor is self.seen and tensor.data_ptr() == self.source:
            return True
        self.seen = None
        if tensor.shape != self.shape or tensor.dtype != self._dtype:
            return False
        if self.is_torch:
            if tensor.device != self._device:
                return False
            # A subclass may keep its values elsewhere, and a null pointer means that there is no memory.
            if self._addresses and type(tensor) is self._plain and tensor.is_contiguous():
                self.source = tensor.data_ptr()
                self.seen = tensor if self.source else None
        return True

    def copy(self, tensor: Any, call: int | None = None) -> Buffer | None:
        """Start to copy a tensor for which :meth:`fits` was just true. Never waits for a device.

        Returns the next free buffer, or None if all are in use. ``call``: the number of the writer's call, if
        nothing is copied after it for the same step; then an event is recorded behind the copy.
        """
        taken, count = self.taken, self.count
        used = taken - self.released
        if used >= count:
            return None
        if not used:  # start over, with the buffers that are still in the processor's cache
            self._base = taken
        index = (taken - self._base) % count
        taken += 1
        device, events, event, stream, at = self._device_calls, self.events, None, None, 0
        if call is None:
            events = None
        elif events is not None:
            at = taken % events.size
            event = events.ends[at]
        marks = self._marks
        if marks is not None:
            # What was copied two steps ago has arrived, or the device lags.
            device.keeps_lock = marks[self._last_but_one] != self._not_copied
            marks[index] = self._not_copied
            self._last_but_one, self._last = self._last, index
        if tensor is not self.seen:
            self._copy_values(index, tensor)
            if event is not None:
                stream = device.stream()
                device.record(event, stream)
        elif device is None:
            _memmove(self._addresses[index], self.source, self.slot_bytes)
        else:
            stream = device.copy(self._addresses[index], self.source, self.slot_bytes, event)
        if events is not None and call is not None:
            began, begin_stream = events.began
            events.streams[at], events.calls[at] = stream, call
            events.begin_streams[at] = begin_stream if began == call else None
        return tuple.__new__(Buffer, (self, index, taken))  # faster than Buffer(...)

    def _copy_values(self, index: int, tensor: Any) -> None:
        """Copy a tensor that cannot be copied by its address."""
        if self.is_torch:
            self._targets[index].copy_(tensor, non_blocking=True)
        elif tensor.flags.c_contiguous:
            self._bytes[index][:] = tensor.data.cast("B")
        else:
            np.copyto(self._targets[index], tensor)

    def take(self, buffer: Buffer) -> bool:
        """Mark the buffer that :meth:`copy` returned as in use; whether many are."""
        self.taken = buffer.taken
        return self.taken - self.released >= self.many

    # ---- the background thread

    def wait(self, first: Buffer, last: Buffer) -> None:
        """Wait until all buffers from ``first`` to ``last`` are filled, without the interpreter lock."""
        if self.events is not None:
            self.events.wait(first.taken, last.taken)

    def release(self, buffer: Buffer) -> None:
        """Free a buffer and all that were taken before it."""
        self.released = buffer.taken

    def fill_memory(self) -> None:
        """Give all buffers their memory, once: the engine's thread would wait for that of each."""
        if not self._has_memory:
            self._has_memory = True
            if self.events is None:  # else it is pinned
                _populate(self.host)


def _populate(array: npt.NDArray[Any]) -> None:
    """Give all pages of an array memory, while another thread may write to it; no effect where it cannot."""
    try:
        madvise = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    first = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    for at in range(first, end, _POPULATED_AT_ONCE):
        if madvise(at, min(_POPULATED_AT_ONCE, end - at), _POPULATE_WRITE):
            return
