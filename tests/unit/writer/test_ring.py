"""Tests of the memory of a ring's buffers."""

from __future__ import annotations

import ctypes
import mmap
import platform
import re
import sys
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from eplb_dump import ring as module
from eplb_dump.ring import Ring

#: 58 layers × 288 slots, 34 MB, of which a new ring has 16 MiB.
EXAMPLE, COUNT = np.zeros((58, 288), np.int32), 512


def whole_pages(array: npt.NDArray[Any]) -> tuple[int, int]:
    """Where an array's whole pages begin, and how many they are."""
    first = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    return first, (array.ctypes.data + array.nbytes - first) // mmap.PAGESIZE


def resident(array: npt.NDArray[Any]) -> float:
    """The share of an array's whole pages that have memory."""
    first, pages = whole_pages(array)
    seen = (ctypes.c_ubyte * pages)()
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    assert mincore(first, pages * mmap.PAGESIZE, seen) == 0, ctypes.get_errno()
    return sum(byte & 1 for byte in seen) / pages


def take_memory(array: npt.NDArray[Any]) -> None:
    """Take an array's memory; it may have come with some that something freed before."""
    first, pages = whole_pages(array)
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    assert madvise(first, pages * mmap.PAGESIZE, mmap.MADV_DONTNEED) == 0, ctypes.get_errno()


KERNEL = [int(number) for number in re.findall(r"\d+", platform.release())[:2]]


@pytest.mark.skipif(
    sys.platform != "linux" or KERNEL < [5, 14], reason="memory is given ahead by Linux 5.14 and newer"
)
def test_background_thread_gives_all_buffers_memory_while_the_engine_fills_them() -> None:
    ring = Ring(EXAMPLE, COUNT)
    take_memory(ring.host[COUNT // 2 :])
    assert resident(ring.host) < 0.6
    filled, ended = threading.Event(), threading.Event()

    def engine() -> None:
        """Fill the buffers that have memory, again and again."""
        while not ended.is_set():
            for number in range(100):
                ring.host[number] = number
            filled.set()

    thread = threading.Thread(target=engine)
    thread.start()
    assert filled.wait(60)
    ring.fill_memory()
    share = resident(ring.host)
    ended.set()
    thread.join()
    assert (ring.host[:100] == np.arange(100)[:, np.newaxis, np.newaxis]).all()
    assert share == 1


@pytest.mark.parametrize("missing", ["libc", "advice"])
def test_ring_works_where_memory_cannot_be_given_ahead(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: None) -> Any:
        raise OSError

    if missing == "libc":
        monkeypatch.setattr(module.ctypes, "CDLL", none)
    else:
        monkeypatch.setattr(module, "_POPULATE_WRITE", 1 << 20)
    ring = Ring(EXAMPLE, COUNT)
    ring.host[-1] = 7
    ring.fill_memory()
    assert (ring.host[-1] == 7).all()
