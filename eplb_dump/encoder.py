"""The encoder: a batch of queued steps becomes frames, and what cannot be recorded is rejected.

It runs on the background thread, in few large numpy calls, which release the interpreter lock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_dump.events import Events
from eplb_dump.format import journal
from eplb_dump.format.frames import Piece
from eplb_dump.format.journal import Float32, Int32, StepRows
from eplb_dump.format.schema import EMPTY_SLOT, MAX_LOAD, Status
from eplb_dump.format.session import SessionInfo
from eplb_dump.format.session_writer import PlacementEncoder
from eplb_dump.ring import Buffer, Ring
from eplb_dump.staging import Entry

LAST_MAP_INVALID = "the last physical_to_logical_map was not valid"


class Encoded(NamedTuple):
    """A batch as it is written."""

    #: Placements, then loads, then the steps frame that commits them.
    frames: list[Piece]
    #: uint8 [steps], each step's.
    status: npt.NDArray[np.uint8]
    #: How many loads could not be recorded, by reason.
    rejected: Counter[str]


class Encoder:
    """Turns the steps of one session into frames, batch by batch."""

    def __init__(self, info: SessionInfo, notify: Callable[[str], None]) -> None:
        """``notify`` gets warnings, which may come more than once."""
        self._notify = notify
        self._num_logical_experts = info.num_logical_experts
        #: None until a load tells it.
        self._num_moe_layers = None if info.moe_layers is None else len(info.moe_layers)
        self._placements = PlacementEncoder()
        #: Why the last placement cannot be used; loads under it are rejected.
        self._fault: str | None = None
        #: The last step with a load.
        self._last_step = -2
        #: The last buffer with a load, and what it held.
        self._last_total: tuple[Buffer | None, npt.NDArray[Any]] = None, np.empty(0)
        #: A placement from before ``num_moe_layers`` was known, its step and EP size.
        self._early: tuple[Int32, int, int] | None = None

    def encode(self, batch: Sequence[Entry], first_step: int) -> Encoded:
        """Encode a batch, and reject what cannot be recorded.

        Args:
            batch: its loads are in consecutive buffers of one ring, and so are its placements; both are
                released.
            first_step: no placement is stated for a step before this one.
        """
        status = np.array([entry.status for entry in batch], np.uint8)
        rejected: Counter[str] = Counter()
        staged = [i for i, entry in enumerate(batch) if entry.load is not None]
        frames: list[Piece] = []
        device_ms = journal.unknown_ms(len(batch))
        if staged:
            ring, first, last = _loads_of(batch, staged)
            low, high = first.number, last.number
            ring.wait(first, last)  # also for the placements that were copied beside the loads
            if ring.events is not None:
                device_ms[staged] = [self._elapsed_ms(ring.events, batch[i]) for i in staged]
            self._num_moe_layers = ring.shape[0]
            frames += self._early_placement(first_step)
            if batch[staged[0]].placement is None:
                frames += self._restate_placement(batch[staged[0]])
        changes, faults = self._take_placements(batch)
        frames += changes
        if staged:
            load, unknown = self._counted(ring.host[low : high + 1], [batch[i] for i in staged])
            largest, faults = _check_loads(
                load, [faults[i] or why for i, why in zip(staged, unknown, strict=True)]
            )
            for i, fault in zip(staged, faults, strict=True):
                if fault is not None:
                    status[i] = Status.REJECTED
                    rejected[fault] += 1
            for fault in rejected:
                self._notify(f"rejected a step; stats() counts rejected steps: {fault}")
            good = [i for i, fault in enumerate(faults) if fault is None]
            if good:
                steps = np.array([batch[staged[i]].step for i in good], np.int64)
                chosen = load if len(good) == len(load) else load[good]
                ep_size = batch[staged[0]].ep_size
                frames += journal.loads_frame(steps, journal.narrow(chosen, largest), ep_size)
            ring.release(last)
            ring.fill_memory()
        frames.append(journal.steps_frame(_rows(batch, status, device_ms)))
        return Encoded(frames, status, rejected)

    def _counted(
        self, totals: npt.NDArray[Any], entries: Sequence[Entry]
    ) -> tuple[npt.NDArray[Any], list[str | None]]:
        """What was counted in each pass, of the loads ``[n, layers, physical]`` that were handed over.

        And why that is not known: an engine that does not zero its counts says what they count on from.
        """
        buffers = [entry.load for entry in entries if entry.load is not None]
        before = [self._last_total[0], *buffers[:-1]]
        counted = totals
        faults: list[str | None] = [None] * len(entries)
        for i, entry in enumerate(entries):
            if not entry.since:
                continue
            if counted is totals:
                counted = totals.copy()
            last = before[i]
            if last is None or last.taken != entry.since or last.ring is not buffers[i].ring:
                faults[i] = "expert_load counts on from a step that was not recorded"
            else:
                counted[i] -= totals[i - 1] if i else self._last_total[1]
        self._last_total = buffers[-1], totals[-1].copy()
        return counted, faults

    def _elapsed_ms(self, events: Events, entry: Entry) -> float:
        """The step's time on the device, NaN if unknown."""
        assert entry.load is not None
        follows = entry.step == self._last_step + 1
        self._last_step = entry.step
        return events.elapsed_ms(entry.load.taken, follows=follows)

    # ---- placements

    def _take_placements(self, batch: Sequence[Entry]) -> tuple[list[bytes], list[str | None]]:
        """The frames of placements that changed; and for each entry why its placement cannot be used."""
        given = [entry.placement for entry in batch if entry.placement is not None]
        # With a load, its event covers both.
        alone = [entry.placement for entry in batch if entry.load is None and entry.placement is not None]
        if alone:
            alone[0].ring.wait(alone[0], alone[-1])
        differs = iter(self._differing(batch, given))
        frames: list[bytes] = []
        faults: list[str | None] = []
        taken = True
        for entry in batch:
            if entry.placement is None:
                faults.append(LAST_MAP_INVALID if self._fault is not None else None)
                continue
            # `differs` compares with the placement before this one, which may not have been taken.
            shape = None if entry.load is None else tuple(entry.load.ring.shape)
            if next(differs) or not taken or shape not in (None, tuple(entry.placement.ring.shape)):
                raw = entry.placement.ring.host[entry.placement.number]
                taken = shape is not None or self._fits(raw, entry.step, entry.ep_size)
                if taken:
                    frames += self._take_placement(raw, entry.step, entry.ep_size, shape)
            faults.append(self._fault)
        for buffer in given:
            buffer.ring.release(buffer)
        return frames, faults

    def _differing(self, batch: Sequence[Entry], given: Sequence[Buffer]) -> list[bool]:
        """Which of the given placements may differ from the one before it, compared in one pass."""
        if not given:
            return []
        ring, low, _ = given[0]
        high = given[-1].number
        maps = ring.host[low : high + 1]
        last = self._placements.current
        first = (
            self._fault is not None
            or last is None
            or last.shape != tuple(ring.shape)
            or self._placements.ep_size != batch[-1].ep_size
            or bool((maps[0] != last).any())
        )
        later: list[bool] = (maps[1:] != maps[:-1]).any(axis=(1, 2)).tolist()
        return [first, *later]

    def _fits(self, raw: npt.NDArray[Any], step: int, ep_size: int) -> bool:
        """Whether a placement without a load can be of this model; if not, it is left out.

        A load that was rejected may have been of another model, and its placement with it. While the
        number of layers is unknown, the placement is kept for :meth:`_early_placement`.
        """
        if self._num_moe_layers is None:
            self._early = raw.astype(np.int32), step, ep_size
            return False
        if raw.shape[0] == self._num_moe_layers and raw.shape[1] % ep_size == 0:
            return True
        self._notify("a physical_to_logical_map with a different shape came without a load; ignored")
        return False

    def _early_placement(self, first_step: int) -> list[bytes]:
        """The frame of a placement that came before the first load."""
        if self._early is None:
            return []
        (raw, step, ep_size), self._early = self._early, None
        step = max(step, first_step)
        return self._take_placement(raw, step, ep_size, None) if self._fits(raw, step, ep_size) else []

    def _restate_placement(self, entry: Entry) -> list[bytes]:
        """If only ep_size changed, the same placement means other ranks and is stated again."""
        assert entry.load is not None
        current = self._placements.current
        # After a change of shape the placement is not known.
        if current is None or current.shape != tuple(entry.load.ring.shape):
            return []
        return self._placements.encode(entry.step, current, entry.ep_size)

    def _take_placement(
        self, raw: npt.NDArray[Any], step: int, ep_size: int, load_shape: tuple[int, ...] | None
    ) -> list[bytes]:
        """The frames of a placement, if it is valid; a copy of it is kept to compare the next with."""
        if load_shape not in (None, raw.shape):
            self._fault = "physical_to_logical_map does not have the shape of expert_load"
            return []
        if int(raw.min()) < EMPTY_SLOT or int(raw.max()) >= self._num_logical_experts:
            self._fault = "physical_to_logical_map contains an expert that does not exist"
            return []
        self._fault = None
        return self._placements.encode(step, raw.astype(np.int32), ep_size)


def _loads_of(batch: Sequence[Entry], staged: Sequence[int]) -> tuple[Ring, Buffer, Buffer]:
    """The ring of a batch's loads, and its first and last buffer."""
    first, last = batch[staged[0]].load, batch[staged[-1]].load
    assert first is not None
    assert last is not None
    return first.ring, first, last


def _check_loads(load: npt.NDArray[Any], faults: list[str | None]) -> tuple[int, list[str | None]]:
    """The largest count of loads ``[n, layers, physical]``, and why each load cannot be recorded."""
    # Read as unsigned, a negative count is a huge one: one pass finds both faults.
    limit = min(MAX_LOAD, int(np.iinfo(load.dtype).max))
    unsigned = load.view(f"u{load.dtype.itemsize}")
    largest = int(unsigned.max())
    if largest <= limit:
        return largest, faults
    found = list(faults)
    for i, (one, seen) in enumerate(zip(load, unsigned, strict=True)):
        if found[i] is None and int(seen.max()) > limit:
            negative = one.dtype.kind == "i" and int(one.min()) < 0
            found[i] = "negative counts" if negative else f"counts above {MAX_LOAD}"
    return MAX_LOAD, found


def _rows(batch: Sequence[Entry], status: npt.NDArray[np.uint8], device_ms: Float32) -> StepRows:
    step, time_ns, monotonic_ns, _, num_tokens, phase, step_ms, *_ = zip(*batch, strict=True)
    codes, phases = journal.phase_codes(phase)
    return StepRows(
        step=np.array(step, np.int64),
        time_ns=np.array(time_ns, np.int64),
        monotonic_ns=np.array(monotonic_ns, np.int64),
        status=status,
        num_tokens=np.array(num_tokens, np.int64),
        phase=codes,
        step_ms=np.array(step_ms, np.float32),  # None becomes NaN
        device_ms=device_ms,
        phases=phases,
    )
