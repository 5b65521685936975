"""The journal: the open segment of a session, an append-only file of frames.

Both sides are here, so that they stay consistent: the frames that the writer appends, and
:class:`JournalSegment`, which reads a journal's valid prefix, live or after a crash. Sealing and
the reader both use :class:`JournalSegment`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from eplb_dump.format import frames
from eplb_dump.format.files import discard
from eplb_dump.format.frozen import frozen
from eplb_dump.format.schema import (
    DURATIONS,
    EMPTY_SLOT,
    JOURNAL_PATTERN,
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_LOAD,
    MAX_NUMBER,
    FormatError,
    Status,
    holds,
    journal_name,
)
from eplb_dump.format.session import SessionInfo

#: No session frame is larger. A larger file without a readable first frame is damaged.
_MAX_FIRST_FRAME = 1 << 16

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
#: Counts of slots: int32, or int64 if one is above MAX_LOAD.
Loads = npt.NDArray[np.int32] | npt.NDArray[np.int64]


def lock(fd: int) -> bool | None:
    """Lock a file. True if it worked, False if another process holds it, None if locks are not supported."""
    try:
        import fcntl
    except ImportError:  # not on Windows, where no engine writes
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _joined(parts: Sequence[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


@frozen
class Shape:
    """The shape of the loads in one segment; when it changes, a new segment begins."""

    ep_size: int
    num_moe_layers: int
    num_physical_experts: int

    @property
    def slots_per_rank(self) -> int:
        return self.num_physical_experts // self.ep_size

    @property
    def impossible(self) -> bool:
        """Whether no load can have this shape: slots that ranks cannot share evenly, or absurd sizes."""
        return (
            min(self.ep_size, self.num_moe_layers, self.num_physical_experts) < 1
            or not holds(self.num_moe_layers, self.num_physical_experts)
            or self.num_physical_experts % self.ep_size != 0
        )


@frozen
class StepRows:
    """Rows of the ``steps`` table as arrays of one length n.

    ``num_tokens`` and ``phase`` (an index into ``phases``) are -1 if unknown; ``step_ms`` and ``device_ms``
    are NaN.
    """

    step: Int64
    time_ns: Int64
    monotonic_ns: Int64
    status: npt.NDArray[np.uint8]
    num_tokens: Int64
    phase: npt.NDArray[np.signedinteger[Any]]
    step_ms: Float32
    device_ms: Float32
    phases: tuple[str, ...] = ()

    @classmethod
    def concat(cls, parts: Sequence[StepRows]) -> StepRows:
        if len(parts) == 1:
            return parts[0]
        phases = tuple(dict.fromkeys(name for part in parts for name in part.phases))
        index = {name: i for i, name in enumerate(phases)}
        codes = []
        for part in parts:
            translate = np.array([index[name] for name in part.phases] + [-1], np.int32)
            codes.append(translate[part.phase])
        return cls(
            step=_joined([part.step for part in parts], np.int64),
            time_ns=_joined([part.time_ns for part in parts], np.int64),
            monotonic_ns=_joined([part.monotonic_ns for part in parts], np.int64),
            status=_joined([part.status for part in parts], np.uint8),
            num_tokens=_joined([part.num_tokens for part in parts], np.int64),
            phase=_joined(codes, np.int32),
            step_ms=_joined([part.step_ms for part in parts], np.float32),
            device_ms=_joined([part.device_ms for part in parts], np.float32),
            phases=phases,
        )

    def select(self, mask: npt.NDArray[Any]) -> StepRows:
        """The rows of an index or a mask; itself if the mask selects all."""
        if mask.dtype == np.bool_ and mask.all():
            return self
        return StepRows(
            self.step[mask],
            self.time_ns[mask],
            self.monotonic_ns[mask],
            self.status[mask],
            self.num_tokens[mask],
            self.phase[mask],
            self.step_ms[mask],
            self.device_ms[mask],
            self.phases,
        )


@frozen
class PlacementRows:
    """Rows of the ``placements`` table: n changed layers, each with the experts in its slots."""

    step: Int64
    #: Index of the MoE layer, from 0.
    layer: Int32
    ep_size: Int32
    #: int32 [num_physical_experts] per row.
    physical_to_logical: list[Int32]


def session_frame(info: SessionInfo, seq: int) -> bytes:
    return frames.encode("session", {"session": info.to_dict(), "seq": seq})


def unknown_ms(n: int) -> Float32:
    """Durations of n steps, all unknown."""
    return np.full(n, np.nan, np.float32)


def impossible_ms(ms: npt.NDArray[Any]) -> bool:
    """Whether a duration is negative or infinite; NaN is unknown."""
    return bool(((ms < 0) | np.isinf(ms)).any())


def steps_frame(rows: StepRows) -> bytes:
    durations = {name: getattr(rows, name) for name in DURATIONS}
    return frames.encode(
        "steps",
        {"phases": list(rows.phases)},
        {
            "step": rows.step,
            "time_ns": rows.time_ns,
            "monotonic_ns": rows.monotonic_ns,
            "status": rows.status,
            "num_tokens": rows.num_tokens,
            "phase": rows.phase,
            # As their bits: readers of 1.0 take only frames of integers. Left out if all are unknown.
            **{name: ms.view(np.int32) for name, ms in durations.items() if not np.isnan(ms).all()},
        },
    )


def narrow(load: npt.NDArray[Any], largest: int) -> npt.NDArray[Any]:
    """Loads as a loads frame has them, in the narrowest type that holds ``largest``.

    Args:
        load: any integer type, ``[n, num_moe_layers, num_physical_experts]``.

    Returns:
        uint8, uint16, int32 or int64 ``[num_moe_layers, n, num_physical_experts]``, contiguous.
    """
    types = ((np.uint8, 1 << 8), (np.uint16, 1 << 16), (np.int32, MAX_LOAD + 1))
    dtype = next((dtype for dtype, end in types if largest < end), np.int64)
    n, layers, physical = load.shape
    out = np.empty((layers, n, physical), dtype)
    np.copyto(out, load.transpose(1, 0, 2), casting="unsafe")
    return out


def rank_loads(load: Loads, ep_size: int) -> Int64:
    """The sum over each EP rank's slots, of loads ``[..., num_physical_experts]``."""
    # Over few slots, einsum is three times as fast as sum.
    slots = load.reshape(*load.shape[:-1], ep_size, load.shape[-1] // ep_size)
    ranks: Int64 = np.einsum("...s->...", slots, dtype=np.int64)
    return ranks


def sums_from(values: npt.NDArray[Any], starts: Int64, dtype: npt.DTypeLike = np.int64) -> npt.NDArray[Any]:
    """The sums over the steps from each start to the next: ``[len(starts), ..., m]``.

    ``values``: ``[..., n, m]``, of n steps.
    """
    # Unlike reduceat, it does not cast value by value, and it releases the interpreter lock.
    parts = np.split(values, starts[1:], axis=-2)
    return np.stack([part.sum(axis=-2, dtype=dtype) for part in parts])


def phase_codes(phases: Sequence[str | None]) -> tuple[npt.NDArray[np.int16], tuple[str, ...]]:
    """Each step's phase as an index into the distinct names, -1 if it has none; and the names."""
    names = tuple(name for name in dict.fromkeys(phases) if name is not None)
    code: dict[str | None, int] = {name: i for i, name in enumerate(names)}
    return np.array([code.get(name, -1) for name in phases], np.int16), names


def loads_frame(step: Int64, load: npt.NDArray[Any], ep_size: int) -> list[frames.Piece]:
    """``load``: as :func:`narrow` returns it."""
    return frames.encode_pieces("loads", {"ep_size": ep_size}, {"step": step, "load": load})


def placements_frame(step: Int64, layer: Int32, physical_to_logical: Int32, ep_size: int) -> bytes:
    """``physical_to_logical``: int32 ``[n, num_physical_experts]``, one row per changed layer."""
    arrays: dict[str, npt.NDArray[Any]] = {
        "step": step,
        "layer": layer,
        "physical_to_logical": physical_to_logical,
    }
    return frames.encode("placements", {"ep_size": ep_size}, arrays)


def closed_frame(stats: dict[str, Any]) -> bytes:
    """The last frame of a session whose writer was closed, with its accounting.

    The last journal has it, because it can stay unsealed, and finally the manifest.
    """
    return frames.encode("closed", {"closed_unix_ns": time.time_ns(), "stats": stats})


@frozen
class _LoadFrame:
    step: Int64
    offset: int
    dtype: np.dtype[Any]
    #: Indices of the frame's steps that are committed.
    keep: npt.NDArray[np.intp]


class JournalAppender:
    """The writing side: an open journal, which only ever holds whole batches of frames."""

    def __init__(self, folder: Path, info: SessionInfo, seq: int) -> None:
        """Create the journal. Raises OSError, also if a file of that name exists."""
        self.path = folder / journal_name(seq)
        self.size = 0
        #: By the monotonic clock, in seconds.
        self.opened_at = time.monotonic()
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        # Held until the journal is sealed or the process dies, so that others can tell.
        lock(self._fd)
        try:
            self.append(session_frame(info, seq))
        except OSError:
            self.close()
            discard([self.path])
            raise

    def append(self, *parts: frames.Piece) -> None:
        """Write all parts or none of them. Raises OSError, also if the file was deleted.

        The data survives a crash of the process. It is not synced to the disk: that would protect
        only against a crash of the machine, and cost time for every batch.
        """
        if os.fstat(self._fd).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "the journal was deleted while it was written")
        total = sum(map(len, parts))
        end = self.size + total
        try:
            # One call, so that only a kill in the middle of it tears a batch.
            done = os.writev(self._fd, parts)
            rest = memoryview(b"".join(parts))[done:] if done < total else memoryview(b"")
            while rest:
                done = os.write(self._fd, rest)
                if not done:
                    raise OSError(errno.EIO, "nothing was written")
                rest = rest[done:]
        except BaseException:  # also if there is no memory, after the write
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.size)
            raise
        self.size = end

    def close(self) -> None:
        """Close the file, once. Raises OSError; the descriptor is free again all the same."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class UnbegunJournal(FormatError):
    """A journal whose first frame is incomplete: it is just being created, or its writer was killed then."""


class JournalSegment:
    """The valid prefix of a journal, as of the moment it was opened.

    Opening verifies the whole prefix. Loads stay in the file and are read again a few layers at a
    time, so that memory does not grow with the segment.
    """

    def __init__(self, path: frames.NamedFile, limit: int | None = None) -> None:
        """Open and verify; no more than the first ``limit`` bytes, if given.

        Raises OSError, UnbegunJournal if the session frame is not written yet, and FormatError if
        the journal cannot be read.
        """
        match = JOURNAL_PATTERN.fullmatch(path.name)
        if match is None:
            raise FormatError("it is not named like a journal")
        self.path = path
        self.seq = int(match[1])
        self._file: BinaryIO = path.open("rb")
        # Readers keep journals open as long as the run is open, without a `with` block.
        self._unclosed = weakref.finalize(self, self._file.close)
        # Not at interpreter exit: a thread may still be sealing this journal then.
        self._unclosed.atexit = False
        try:
            self._index(limit)
        except BaseException:
            self._file.close()
            raise

    def _index(self, limit: int | None) -> None:
        size = self._file.seek(0, 2)
        #: Whether the file has more than the ``limit``: it is being written.
        self.limited = limit is not None and limit < size
        size = size if limit is None else min(size, limit)
        self._file.seek(0)
        info: SessionInfo | None = None
        step_parts: list[StepRows] = []
        load_frames: list[tuple[Int64, int, np.dtype[Any], tuple[int, int, int]]] = []
        placement_parts: list[PlacementRows] = []
        #: The header of the frame that ends a session in order; None if the journal does not have it.
        self.closed: dict[str, Any] | None = None
        self.tail = frames.Tail(0, size)
        for item in frames.scan(self._file, size):
            if isinstance(item, frames.Tail):
                self.tail = item
                break
            try:
                if info is None:
                    info = session_of(item, self.seq)
                elif item.kind == "steps":
                    step_parts.append(step_rows(item))
                elif item.kind == "loads":
                    load_frames.append(load_entry(item))
                elif item.kind == "placements":
                    placement_parts.append(placement_rows(item))
                elif item.kind == "closed":
                    self.closed = item.header
                # Other kinds come from a newer minor version, which only adds.
            except (KeyError, TypeError, IndexError) as error:
                raise FormatError(f"the frame at byte {item.start} lacks {error}") from None
        if info is None:
            if self.tail.fault != "damaged" and size < _MAX_FIRST_FRAME:
                raise UnbegunJournal("it contains only an incomplete write")
            raise FormatError("its first frame cannot be read")
        self.info = info
        self.steps = StepRows.concat(step_parts)
        self._set_loads(load_frames)
        placements = PlacementRows(
            _joined([part.step for part in placement_parts], np.int64),
            _joined([part.layer for part in placement_parts], np.int32),
            _joined([part.ep_size for part in placement_parts], np.int32),
            [slots for part in placement_parts for slots in part.physical_to_logical],
        )
        # The steps frame of a batch comes last: without it, the batch is torn and does not count.
        last = int(self.steps.step.max()) if len(self.steps.step) else -1
        committed = np.flatnonzero(placements.step <= last)
        self.placements = PlacementRows(
            placements.step[committed],
            placements.layer[committed],
            placements.ep_size[committed],
            [placements.physical_to_logical[i] for i in committed],
        )
        check_placements(self.placements, info, self.shape)

    def _set_loads(self, entries: list[tuple[Int64, int, np.dtype[Any], tuple[int, int, int]]]) -> None:
        recorded = self.steps.step[self.steps.status == Status.RECORDED]
        self.shape: Shape | None = None
        self._loads: list[_LoadFrame] = []
        kept_steps: list[Int64] = [np.empty(0, np.int64)]
        for step, offset, dtype, sizes in entries:
            self.shape = load_shape(sizes, self.info, self.shape)
            keep = np.flatnonzero(np.isin(step, recorded))
            self._loads.append(_LoadFrame(step, offset, dtype, keep))
            kept_steps.append(step[keep])
        self.load_steps: Int64 = np.concatenate(kept_steps)
        check_load_steps(self.load_steps, self.steps)

    @property
    def load_type(self) -> npt.DTypeLike:
        """int32, or int64 if a frame has counts that int32 does not hold."""
        return np.int32 if all(np.can_cast(entry.dtype, np.int32) for entry in self._loads) else np.int64

    def read_layers(self, first: int, last: int) -> Loads:
        """Loads of MoE layers ``first`` to ``last - 1``: ``load_type [last - first, n, num_physical]``."""
        assert self.shape is not None
        physical = self.shape.num_physical_experts
        out = np.empty((last - first, len(self.load_steps), physical), self.load_type)
        at = 0
        for entry in self._loads:
            row_bytes = len(entry.step) * physical * entry.dtype.itemsize
            self._file.seek(entry.offset + first * row_bytes)
            data = self._file.read((last - first) * row_bytes)
            if len(data) < (last - first) * row_bytes:
                raise FormatError("it became shorter while it was read")
            load = np.frombuffer(data, entry.dtype).reshape(last - first, len(entry.step), physical)
            # To select steps takes the interpreter lock.
            chosen = load if len(entry.keep) == len(entry.step) else load[:, entry.keep]
            out[:, at : at + len(entry.keep)] = chosen
            at += len(entry.keep)
        return out

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JournalSegment:
        # At interpreter exit the finalizer would close the file while the writer's thread seals it.
        self._unclosed.detach()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ep_size(frame: frames.Frame) -> int:
    ep_size = frame.header["ep_size"]
    if type(ep_size) is not int or not 1 <= ep_size <= MAX_EXPERTS:
        raise FormatError(f"the frame at byte {frame.start} says ep_size = {ep_size!r}")
    return ep_size


def _int64(frame: frames.Frame, name: str) -> Int64:
    """An array as int64, whatever integer type the file has."""
    array: Int64 = frame.arrays[name].astype(np.int64, copy=False)
    return array


def _milliseconds(frame: frames.Frame, name: str, n: int) -> Float32:
    """The durations of a steps frame. Raises FormatError if they are not float32 in the bits of an int32."""
    array = frame.arrays.get(name)
    if array is None:
        return unknown_ms(n)
    if array.dtype != np.int32:
        raise FormatError(f"the steps frame at byte {frame.start} has {name} of type {array.dtype}")
    return array.view(np.float32)


def step_rows(frame: frames.Frame) -> StepRows:
    """The rows of a steps frame. Raises FormatError, and KeyError if an array is missing."""
    a = frame.arrays
    phases = tuple(str(name) for name in frame.header["phases"])
    step, time_ns, monotonic_ns = (_int64(frame, name) for name in ("step", "time_ns", "monotonic_ns"))
    num_tokens, phase = _int64(frame, "num_tokens"), _int64(frame, "phase")
    step_ms, device_ms = (_milliseconds(frame, name, len(step)) for name in DURATIONS)
    rows = StepRows(step, time_ns, monotonic_ns, a["status"], num_tokens, phase, step_ms, device_ms, phases)
    lengths = {array.shape for array in a.values()}
    statuses = 0 <= rows.status.min(initial=0) <= rows.status.max(initial=0) < len(Status)
    numbered = 0 <= rows.step.min(initial=0) <= rows.step.max(initial=0) < MAX_NUMBER
    known = (
        numbered and statuses and -1 <= rows.phase.min(initial=0) <= rows.phase.max(initial=-1) < len(phases)
    )
    wrong = len(lengths) != 1 or rows.step.ndim != 1 or not known
    if wrong or impossible_ms(step_ms) or impossible_ms(device_ms):
        raise FormatError(f"the steps frame at byte {frame.start} contradicts itself")
    return rows


def load_entry(frame: frames.Frame) -> tuple[Int64, int, np.dtype[Any], tuple[int, int, int]]:
    """Steps, byte offset, type and ``(ep_size, layers, physical)`` of a loads frame.

    Raises FormatError, and KeyError if an array is missing.
    """
    step, load, ep_size = _int64(frame, "step"), frame.arrays["load"], _ep_size(frame)
    wrong_shape = load.ndim != 3 or load.shape[1] != len(step) or load.shape[2] % ep_size
    if wrong_shape or load.min(initial=0) < 0 or step.min(initial=0) < 0:
        raise FormatError(f"the loads frame at byte {frame.start} contradicts itself")
    return step, frame.offsets["load"], load.dtype, (ep_size, load.shape[0], load.shape[2])


def placement_rows(frame: frames.Frame) -> PlacementRows:
    """The rows of a placements frame. Raises FormatError, and KeyError if an array is missing."""
    maps, step, layer = frame.arrays["physical_to_logical"], _int64(frame, "step"), frame.arrays["layer"]
    if maps.ndim != 2 or not step.shape == layer.shape == maps.shape[:1] or step.min(initial=0) < 0:
        raise FormatError(f"the placements frame at byte {frame.start} contradicts itself")
    ep_size = np.full(len(step), _ep_size(frame), np.int32)
    return PlacementRows(step, layer.astype(np.int32), ep_size, list(maps.astype(np.int32)))


def session_of(frame: frames.Frame, seq: int) -> SessionInfo:
    """The session in the first frame of journal ``seq``. Raises FormatError, KeyError, TypeError."""
    if frame.kind != "session" or frame.header["seq"] != seq:
        raise FormatError("its first frame does not introduce this journal")
    return SessionInfo.from_dict(frame.header["session"])


def load_shape(sizes: tuple[int, int, int], info: SessionInfo, earlier: Shape | None) -> Shape:
    """The shape of a loads frame. Raises FormatError if it contradicts the session or ``earlier``."""
    shape = Shape(*sizes)
    if shape.impossible:
        raise FormatError(f"it holds loads of an impossible shape ({sizes[1]} × {sizes[2]})")
    if not holds(shape.num_moe_layers, info.num_logical_experts):
        raise FormatError(
            f"its {shape.num_moe_layers} layers × {info.num_logical_experts} experts are too many"
        )
    if info.moe_layers is not None and len(info.moe_layers) != shape.num_moe_layers:
        raise FormatError("its loads have a different number of layers than its session states")
    if earlier not in (None, shape):
        raise FormatError("it holds loads of two shapes")
    return shape


def check_load_steps(load_steps: Int64, rows: StepRows) -> None:
    """Raise FormatError unless the steps with loads are exactly the recorded ones."""
    if not np.array_equal(load_steps, rows.step[rows.status == Status.RECORDED]):
        raise FormatError("its steps and its loads do not agree")


def check_placements(rows: PlacementRows, info: SessionInfo, shape: Shape | None) -> None:
    """Raise FormatError if a layer or an expert is out of range. ``shape`` is None if no load is known."""
    layers = MAX_LAYERS if shape is None else shape.num_moe_layers
    if info.moe_layers is not None:
        layers = min(layers, len(info.moe_layers))
    limit = info.num_logical_experts
    for layer, slots in zip(rows.layer, rows.physical_to_logical, strict=True):
        if not 0 <= layer < layers or slots.min(initial=0) < EMPTY_SLOT or slots.max(initial=0) >= limit:
            raise FormatError("it holds a placement that is out of range")
