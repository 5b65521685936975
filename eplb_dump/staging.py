"""Staging: copies a step's load and placement into buffers, on the engine's thread.

Nothing is taken before the step is queued, so a step that is refused leaves nothing to undo.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from eplb_dump.format.schema import Status, holds
from eplb_dump.ring import Buffer, Ring, StagingError

#: Buffers for placements of tensors that count their versions: they change rarely, or a layer a step.
_PLACEMENT_BUFFERS = 64


class Entry(NamedTuple):
    """One step on its way from the engine's thread to the journal."""

    step: int
    time_ns: int
    monotonic_ns: int
    status: Status
    num_tokens: int
    phase: str | None
    step_ms: float | None
    ep_size: int
    load: Buffer | None
    placement: Buffer | None
    #: The number of the buffer with what the load counts on from; 0: it counts from zero; -1: not known.
    since: int


class Staged(NamedTuple):
    """Filled buffers of one step, which are taken just before the step is queued."""

    load: Buffer | None = None
    placement: Buffer | None = None
    #: The tensor that ``placement`` was copied from.
    placement_tensor: Any = None


class Refused(NamedTuple):
    """Why a step cannot be staged."""

    reason: str
    #: ``expert_load``, ``ep_size``, ``placement`` (or the copy itself), or ``queue``: it is full.
    cause: str


NOTHING = Staged()
#: The call of a copy that is no step's last: no step's time ends there.
_NO_CALL = -1
_QUEUE_IS_FULL = Refused("the queue is full", "queue")


class Staging:
    """The rings of one writer, and what is known of the placement that was staged last.

    Attributes:
        placement_lost: a placement was handed over and could not be kept, so the placement in force
            is not known until the next one comes.
    """

    def __init__(
        self, num_moe_layers: int | None, num_logical_experts: int, queue_steps: int, queue_bytes: int
    ) -> None:
        """``num_moe_layers``: as many as the writer's ``moe_layers`` names, if it was given."""
        self.placement_lost = False
        self._named_layers = num_moe_layers
        self._num_logical_experts = num_logical_experts
        #: Of the first load that was queued; None until a load comes that needs another ring.
        self._num_moe_layers: int | None = None
        self._queue_steps = queue_steps
        self._queue_bytes = queue_bytes
        self._loads: Ring | None = None
        self._placements: Ring | None = None
        self._changes = ChangeDetector()
        #: The ring of the load that the last placement came with. With another ring, and so another
        #: shape, an unchanged placement is staged again, to be rejected.
        self._staged_with: Ring | None = None

    def prepare(self, load: Any, placement: Any) -> None:
        """Allocate the buffers for a load and a placement like these. Raises what :class:`Ring` raises."""
        if self._loads is None:
            self._loads = self._ring_for_loads(load)
        if self._placements is None and placement is not None:
            self._placements = self._ring_for_placements(placement)

    def begin_step(self, call: int) -> None:
        """A forward pass begins, to be recorded by the writer's call number ``call``.

        Raises whatever torch raises.
        """
        ring = self._loads
        if ring is not None and ring.events is not None:
            ring.events.begin(ring.taken + 1, call)

    def stage(self, load: Any, placement: Any, ep_size: int, call: int) -> Staged | Refused:
        """Copy a load, and its placement if it may have changed. Never waits.

        ``call``: how many calls the writer has seen, with this one.
        """
        ring = self._loads
        try:
            # As Ring.fits begins, without the call: this runs once per step.
            if ring is None or not (
                (load is ring.seen and load.data_ptr() == ring.source) or ring.fits(load)
            ):
                ring = self._loads = self._ring_for_loads(load)
        except StagingError as error:
            return Refused(f"expert_load is {error}", "expert_load")
        except Exception as error:
            return Refused(f"expert_load cannot be staged: {type(error).__name__}", "expert_load")
        if ring.shape[1] % ep_size:
            reason = f"{ring.shape[1]} physical experts cannot be divided evenly among {ep_size} EP ranks"
            return Refused(reason, "ep_size")
        if ring.taken - ring.released >= ring.count:
            return _QUEUE_IS_FULL
        buffer = None
        try:
            if placement is not None:
                changes = self._changes
                version = changes.last_version
                # As ChangeDetector.unchanged begins, without the call.
                if self._staged_with is ring and (
                    (version is not None and placement is changes.last and placement._version == version)
                    or changes.unchanged(placement)
                ):
                    self.placement_lost = False  # it is the one that was queued last
                else:
                    buffer = self._copy_placement(placement)
                    if buffer is None:
                        return _QUEUE_IS_FULL
            target = ring.copy(load, call)  # behind the placement's, with the event of both
            if target is None:
                return _QUEUE_IS_FULL
        except StagingError as error:
            return Refused(f"physical_to_logical_map is {error}", "placement")
        except Exception as error:
            return Refused(f"the copy failed: {type(error).__name__}", "placement")
        # Faster than Staged(...): this runs once per step.
        return tuple.__new__(Staged, (target, buffer, placement))

    def stage_placement(self, placement: Any) -> Staged:
        """Copy a placement whose load is not recorded, as later steps may rely on it ("None: as before").

        Raises whatever the tensor raises.
        """
        if placement is None:
            return NOTHING
        if self._changes.unchanged(placement):
            self.placement_lost = False
            return NOTHING
        buffer = self._copy_placement(placement, alone=True)
        return NOTHING if buffer is None else Staged(None, buffer, placement)

    def lose_placement(self) -> None:
        """A placement was handed over that may not be queued."""
        self.placement_lost = True

    def queues_placement(self) -> None:
        """A placement is about to be queued: the one before it is no longer the last."""
        self._changes.forget()

    def note_queued(self, staged: Staged) -> None:
        """Remember a placement, once its step is queued."""
        self._changes.remember(staged.placement_tensor, staged.placement)
        self._staged_with = None if staged.load is None else staged.load.ring
        self.placement_lost = False

    def _copy_placement(self, placement: Any, *, alone: bool = False) -> Buffer | None:
        """Start to copy a placement; None if all buffers are in use. ``alone``: no load is copied behind it.

        Until its step is queued, the placement counts as lost, whatever goes wrong or interrupts.
        """
        self.lose_placement()
        if self._placements is None or not self._placements.fits(placement):
            self._placements = self._ring_for_placements(placement)
        ring = self._placements
        return ring.copy(placement, _NO_CALL if alone else None)

    def _ring_for_loads(self, load: Any) -> Ring:
        """Raises StagingError."""
        ring = Ring(load, self._count(load))
        layers, slots = ring.shape
        if self._named_layers not in (None, layers):
            raise StagingError(f"for {layers} layers, but moe_layers lists {self._named_layers}")
        experts = self._num_logical_experts
        for width, what in ((slots, "slots"), (experts, "logical experts")):
            if not holds(layers, width):
                raise StagingError(f"for {layers} layers × {width} {what}, more than the format can store")
        if self._loads is not None and self._loads.taken:
            self._num_moe_layers = self._loads.shape[0]
        if self._num_moe_layers not in (None, layers):
            raise StagingError(f"for {layers} layers, but earlier loads had {self._num_moe_layers}")
        return ring

    def _ring_for_placements(self, placement: Any) -> Ring:
        """A small ring if torch counts the tensor's changes, else one placement per queued step."""
        # An empty ring first: it checks what kind of object this is.
        if Ring(placement, 0).is_torch and ChangeDetector.version(placement) is not None:
            return Ring(placement, _PLACEMENT_BUFFERS)
        return Ring(placement, self._count(placement))

    def _count(self, tensor: Any) -> int:
        """How many buffers for tensors like this one the queue may have."""
        return min(self._queue_steps, max(4, self._queue_bytes // max(1, _bytes_of(tensor))))


def _bytes_of(tensor: Any) -> int:
    """Size of a tensor; 0 if it is not one."""
    try:
        return int(tensor.nbytes)
    except Exception:  # an object may raise anything here
        return 0


def _root(tensor: Any) -> Any:
    return tensor if tensor._base is None else tensor._base


class ChangeDetector:
    """Knows that a tensor certainly has not changed since it was last remembered. Never waits for a device.

    torch counts in-place writes in a version counter that views share. numpy arrays and inference tensors
    have none: in ordinary memory their values are compared, which costs less than the copy that it saves.
    On a device they always may have changed.
    """

    __slots__ = ("_counted", "_values", "last", "last_version")

    def __init__(self) -> None:
        self.last: Any = None
        #: Whether ``last`` counts its versions.
        self._counted = True
        self.last_version: int | None = None
        #: The values of ``last`` in bytes, if it has no version and they can be compared.
        self._values: bytearray | None = None

    def unchanged(self, tensor: Any) -> bool:
        last = self.last
        if self.last_version is not None:
            same = tensor is last or self._same_storage(tensor, last)
            return same and bool(tensor._version == self.last_version)
        if self._values is None:
            return False
        if type(tensor) is not type(last) or tensor.shape != last.shape or tensor.dtype != last.dtype:
            return False
        values = _values_of(tensor)
        return values is not None and bool(self._values == values)

    @staticmethod
    def _same_storage(tensor: Any, last: Any) -> bool:
        # The last tensor is kept alive here, so its memory cannot have been reused for another.
        return (
            type(tensor) is type(last)
            and not tensor.is_inference()
            # Only views of one tensor share their version counter; .data and from_numpy do not.
            and _root(tensor) is _root(last)
            and tensor.data_ptr() == last.data_ptr()
            and tensor.shape == last.shape
            and tensor.dtype == last.dtype
            and tensor.stride() == last.stride()
        )

    def forget(self) -> None:
        """Another placement may be queued next."""
        self.last_version = self._values = None

    def remember(self, tensor: Any, copy: Buffer | None) -> None:
        """``copy``: of a tensor in ordinary memory, a buffer that has its values."""
        # Asking an inference tensor releases the interpreter lock, which must not happen in every step.
        known = tensor is self.last and not self._counted
        version = None if known else self.version(tensor)
        self.forget()
        self.last, self._counted = tensor, version is not None
        if version is None and copy is not None and copy.ring.events is None:
            self._values = bytearray(copy.ring.host[copy.number])
        self.last_version = version

    @staticmethod
    def version(tensor: Any) -> int | None:
        # An inference tensor has none; asking for it all the same raises, which takes longer than a copy.
        return None if isinstance(tensor, np.ndarray) or tensor.is_inference() else int(tensor._version)


def _values_of(tensor: Any) -> memoryview | None:
    """The bytes of a contiguous tensor in ordinary memory. ``bytearray`` compares them in one call."""
    if not isinstance(tensor, np.ndarray):
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            return None
        tensor = tensor.numpy()
    return tensor.data.cast("B") if tensor.flags.c_contiguous else None
