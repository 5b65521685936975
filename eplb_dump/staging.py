"""Staging: preallocated host buffers that a tensor is copied into on the engine's thread.

A :class:`Ring` holds buffers of one shape and type. Taking, filling and giving back a buffer
allocates nothing; a CUDA tensor is copied asynchronously on the engine's current stream, and an
event tells the background thread when the copy is done. torch is never imported here: it is used
only where the engine already has.
"""

from __future__ import annotations

import sys
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt


class StagingError(ValueError):
    """A tensor that cannot be staged; the text is the reason that the step is rejected for."""


class Slot:
    """One host buffer: ``host`` is its numpy view, valid once :meth:`wait` returned."""

    __slots__ = ("_event", "_ring", "_target", "host")

    def __init__(self, ring: Ring, host: npt.NDArray[Any], target: Any, event: Any) -> None:
        self._ring = ring
        self.host = host
        self._target = target
        self._event = event

    def fill(self, tensor: Any) -> None:
        """Begin to copy a tensor that fits the ring. Never waits for a device."""
        if self._target is None:
            np.copyto(self.host, tensor)
        else:
            self._target.copy_(tensor, non_blocking=True)

    def mark(self) -> None:
        """Note on the stream that everything copied so far is done (CUDA only)."""
        if self._event is not None:
            self._event.record(self._ring.current_stream(self._ring.device))

    def wait(self) -> None:
        """On the background thread: wait for :meth:`mark`'s event, without the interpreter lock."""
        if self._event is not None:
            self._event.synchronize()

    def release(self) -> None:
        self._ring.free.append(self)


class Ring:
    """``count`` buffers for tensors like ``example``.

    The most recently released buffer is taken first: it is the one still in the processor's cache.
    """

    __slots__ = ("current_stream", "device", "dtype", "free", "is_torch", "shape")

    def __init__(self, example: Any, count: int) -> None:
        """Raises StagingError where the example is not an integer tensor of two dimensions."""
        torch = sys.modules.get("torch")
        self.is_torch = torch is not None and isinstance(example, torch.Tensor)
        if not self.is_torch and not isinstance(example, np.ndarray):
            raise StagingError(f"neither a torch tensor nor a numpy array but {type(example).__name__}")
        if example.ndim != 2 or 0 in example.shape:
            raise StagingError(f"of shape {tuple(example.shape)}, not [layers, physical experts]")
        self.shape = example.shape
        self.dtype = example.dtype
        self.device: Any = None
        self.current_stream: Any = None
        self.free: deque[Slot] = deque()
        if self.is_torch:
            self._allocate_torch(torch, example, count)
        else:
            if self.dtype.kind not in "iu" or not self.dtype.isnative:
                raise StagingError(f"of type {self.dtype}, not an integer type")
            block = np.empty((count, *self.shape), self.dtype)
            self.free.extend(Slot(self, host, None, None) for host in block)

    def _allocate_torch(self, torch: Any, example: Any, count: int) -> None:
        if example.dtype.is_floating_point or example.dtype.is_complex or example.dtype == torch.bool:
            raise StagingError(f"of type {example.dtype}, not an integer type")
        if example.layout != torch.strided or example.device.type == "meta":
            raise StagingError(f"of layout {example.layout} on {example.device}")
        self.device = example.device
        on_gpu = self.device.type == "cuda"
        # Buffers made under inference_mode could not be written outside of it.
        with torch.inference_mode(False):
            block = torch.empty((count, *self.shape), dtype=self.dtype, pin_memory=on_gpu)
            hosts = block.numpy()
            for target, host in zip(block, hosts, strict=True):
                # blocking: the background thread sleeps until the event instead of spinning.
                event = torch.cuda.Event(blocking=True) if on_gpu else None
                self.free.append(Slot(self, host, target, event))
        self.current_stream = torch.cuda.current_stream if on_gpu else None

    def fits(self, tensor: Any) -> bool:
        if tensor.shape != self.shape or tensor.dtype != self.dtype:
            return False
        return not self.is_torch or tensor.device == self.device

    def take(self) -> Slot | None:
        """A free buffer, or None where all are in use."""
        try:
            return self.free.pop()
        except IndexError:
            return None


def slot_bytes(example: Any) -> int:
    """Bytes of one buffer for tensors like ``example`` (0 where it is no tensor at all)."""
    try:
        return int(example.nbytes)
    except (AttributeError, TypeError):
        return 0


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
        if isinstance(tensor, np.ndarray) or tensor.is_inference():
            return None
        return int(tensor._version)
