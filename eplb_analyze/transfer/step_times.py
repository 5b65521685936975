"""Which step of a recording each time of another program's file belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_analyze.errors import UsageError
from eplb_analyze.metrics.alignment import (
    CLEARLY,
    MIN_CORRELATION,
    MIN_OVERLAP,
    best_shift,
    correlation,
    evidence,
    standard_errors,
)
from eplb_analyze.metrics.cost import StepTimes
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.run import Run
from eplb_analyze.text import plural
from eplb_analyze.transfer.importers.timings import TABLE, Series, read_series
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64

Float64 = npt.NDArray[np.float64]

#: Only the loads of about this many steps are read to know their tokens.
TOKEN_STEPS = 4096
#: The most steps, sampled ones included, of which an offset is looked for.
MAX_SPAN = 1 << 21
#: By clock, the nearest call of `record` may be that of another step, so many away.
MAX_STEPS_AWAY = 20
#: The longest delay in seconds between a call of `record` and what the other program writes; and how many of
#: its entries, and differences between the two, are looked at to find it.
MAX_DELAY, DELAY_EVENTS, MAX_DIFFERENCES = 1.0, 2000, 1 << 22
#: The match must hold in each of so many parts: a step that one side did not count shifts the rest. The
#: largest parts are looked at by correlation, too, and everywhere; small ones would fit somewhere by chance.
PARTS, NEIGHBORS = (4, 16, 64), 3
#: Two values of :func:`evidence` that differ by less are as large.
AS_LARGE = 0.1


def read_step_times(run: Run, path: Path) -> StepTimes:
    """Read the step times in a file and match them with the steps of a run.

    Several engines or ranks can have written the file. A step takes as long as the slowest of them.

    Raises:
        DumpError: the file cannot be read, or has no step times.
        UsageError: they are of other steps, or it cannot be known of which.
    """
    recorded = run.retry_without_damaged(lambda: _Recorded.of(run))
    found, reasons = [], []
    series = read_series(path)
    for one in series:
        try:
            found.append(_match(recorded, one))
        except UsageError as error:
            reasons.append(str(error))
    if not found:
        raise UsageError(f"--timings {path}: {reasons[0]}")
    step, where = np.unique(np.concatenate([match.step for match in found]), return_inverse=True)
    ms = np.zeros(len(step))
    np.maximum.at(ms, where, np.concatenate([match.ms for match in found]))
    largest = max(found, key=lambda match: len(match.step))
    note = f"{len(step):,} of {len(recorded.step):,} steps have a time from {series[0].source}, {largest.how}"
    if len(found) > 1:
        note += f"; each step takes the time of the slowest of {len(found)} engines or ranks"
    if reasons:
        note += f", {plural(len(reasons), 'other')} left out: {reasons[0]}"
    return StepTimes(step, ms, "engine", note)


@frozen
class _Recorded:
    """What a recording knows about its steps.

    Attributes:
        step: int64 ``[n]``, ascending.
        clock: float64 ``[n]``, seconds since 1970.
        ms: float64 ``[n]``, durations by the writer's clock; NaN if not known.
        tokens: float64 ``[n]``, in any unit; NaN if not known.
    """

    step: Int64
    clock: Float64
    ms: Float64
    tokens: Float64

    @classmethod
    def of(cls, run: Run) -> _Recorded:
        blocks = list(run.blocks())
        if not blocks:
            raise UsageError("the recording has no steps")
        step = np.concatenate([block.step for block in blocks])
        clock = np.concatenate([block.clock_ns for block in blocks]) / 1e9
        counted = np.concatenate([block.num_tokens for block in blocks])
        tokens = np.where(counted >= 0, counted, np.nan)
        if np.isnan(tokens).mean() > 0.5:
            every, seen = max(1, round(len(step) / TOKEN_STEPS)), 0
            tokens = np.full(len(step), np.nan)
            for number, block in enumerate(blocks):
                if block.shape is not None and number % every == 0:
                    at = seen + np.flatnonzero(block.state == StepState.RECORDED)
                    # Every layer routes the same tokens.
                    (_, load), *_ = block.rank_load_parts(first=0, last=1)
                    tokens[at] = load.sum(axis=(1, 2))
                seen += len(block.step)
        apart = np.where(np.diff(step) == 1, np.diff(clock) * 1e3, np.nan)
        since, until = np.insert(apart, 0, np.nan), np.append(apart, np.nan)
        return cls(step, clock, until if _follows(tokens, until) > _follows(tokens, since) else since, tokens)


def _follows(tokens: Float64, ms: Float64) -> float:
    """How much durations follow the tokens, which shows which neighbor ends a step (see analysis.cost)."""
    found = correlation(evidence(tokens), evidence(ms))
    return 0.0 if np.isnan(found) else found


class _Matched(NamedTuple):
    """The times of one engine, and how they were matched."""

    step: Int64
    ms: Float64
    how: str


def _match(recorded: _Recorded, series: Series) -> _Matched:
    """Raises UsageError."""
    pairs = {
        "tokens": (evidence(series.tokens), evidence(recorded.tokens)),
        "the time between steps": (evidence(series.ms), evidence(recorded.ms)),
    }
    known = {kind: pair for kind, pair in pairs.items() if all(np.isfinite(one).any() for one in pair)}
    mine, theirs = next(iter(known.values()), (np.full(len(series.ms), np.nan), recorded.tokens * np.nan))
    if series.time is not None:
        at, how = _by_clock(recorded, series, mine, theirs)
    elif series.step is not None:
        at, how = _by_step(recorded, series.step, mine, theirs)
    else:
        raise UsageError("its steps are unordered and have no clock times")
    inside = at >= 0
    if inside.sum() < MIN_OVERLAP:
        raise UsageError(f"only {inside.sum()} of its {len(at):,} steps are in the recording")
    agreement = {kind: correlation(a[inside], b[at[inside]]) for kind, (a, b) in known.items()}
    agreement = {kind: r for kind, r in agreement.items() if np.isfinite(r)}
    if not agreement:
        how += (
            "; whether they belong to the same steps cannot be verified, because neither tokens nor "
            "times vary"
        )
    else:
        how += "; correlation " + ", ".join(f"{r:.2f} with {kind}" for kind, r in agreement.items())
        kind, best = next(iter(agreement.items()))
        if best < MIN_CORRELATION:
            # A table may hold another kind of time, by the recording's own steps.
            if series.source != TABLE or series.time is not None:
                raise UsageError(
                    f"its times belong to other steps: correlation {best:.2f} with {kind} of this run"
                )
            how += ", which does not show that they belong to the same steps"
        _require_everywhere(recorded.step, mine[inside], theirs, at[inside])
    return _Matched(recorded.step[at[inside]], series.ms[inside], how)


def _by_step(recorded: _Recorded, step: Int64, mine: Float64, theirs: Float64) -> tuple[Int64, str]:
    """Index of each entry's step, int64, −1 if it is not in the recording; and how it was found."""
    expected = int(step[0]) - int(recorded.step[0])
    shift = best_shift(_dense(step, mine), _dense(recorded.step, theirs), expected)
    offset = 0 if shift is None or np.isnan(shift.correlation) else shift.by - expected
    if shift is not None and offset and not shift.is_clear:
        raise UsageError("its step numbers differ from the recording's, and several offsets fit")
    wanted = step + offset
    at = np.searchsorted(recorded.step, wanted).clip(max=len(recorded.step) - 1)
    at = np.where(recorded.step[at] == wanted, at, -1)
    return at, f"matched by step{f', offset {offset:+,}' if offset else ''}"


def _dense(step: Int64, values: Float64) -> Float64:
    """Values by step from the first one on, NaN for steps between."""
    inside = step - step[0] < MAX_SPAN
    dense = np.full(int(step[inside][-1] - step[0]) + 1, np.nan)
    dense[step[inside] - step[0]] = values[inside]
    return dense


def _by_clock(recorded: _Recorded, series: Series, mine: Float64, theirs: Float64) -> tuple[Int64, str]:
    """As :func:`_by_step`, with the step whose call of `record` was nearest, apart from a constant delay."""
    assert series.time is not None
    usual = float(np.median(np.diff(recorded.clock))) if len(recorded.clock) > 1 else 0.0
    best: tuple[float, Int64, str] | None = None
    # `record` may be called at a step's start or at its end.
    for event in (series.time, series.time - series.ms / 1e3):
        at = _nearest(recorded.clock, event - _delay(recorded.clock, event, usual))
        shown = np.full(len(theirs), np.nan)
        shown[at] = mine
        shift = best_shift(shown, theirs, 0, MAX_STEPS_AWAY)
        if shift is None:
            continue
        if shift.by and not shift.is_clear:
            raise UsageError("several shifts of its clock against the recording's fit")
        at = at + shift.by
        at[(at < 0) | (at >= len(theirs))] = -1
        off = event - recorded.clock[at]
        delay = float(np.median(off[at >= 0]))
        # Two entries of one step: the nearer one counts.
        far = np.abs(off - delay)
        order = np.lexsort((far, at))
        again = order[1:][at[order][1:] == at[order][:-1]]
        at[again] = -1
        at[far > usual / 2] = -1
        how = (
            f"matched by clock within {usual * 500:.3g} ms, {delay * 1e3:+.3g} ms after the step was recorded"
        )
        score = (0.0 if np.isnan(shift.correlation) else shift.correlation) + float((at >= 0).mean())
        if best is None or score > best[0]:
            best = score, at, how
    if best is None:
        raise UsageError("too few of its times are near a step of the recording")
    return best[1], best[2]


def _delay(clock: Float64, event: Float64, usual: float) -> float:
    """By how many seconds events follow the calls of `record`: the difference that is most frequent.

    Steps of equal length have several; then it is the smallest, and the series decide between them.
    """
    window = max(MAX_DELAY, 4 * usual)
    first, last = (np.searchsorted(clock, event + side) for side in (-window, window))
    every = max(1, len(event) // DELAY_EVENTS, int((last - first).sum()) // MAX_DIFFERENCES)
    first, count, event = first[::every], (last - first)[::every], event[::every]
    if not count.any():
        away = float(np.median(event - clock[_nearest(clock, event)]))
        raise UsageError(f"its clock times are {abs(away):,.1f} s away from the recording's")
    index = np.arange(count.sum()) + np.repeat(first - (count.cumsum() - count), count)
    width = max(usual / 8, 1e-6)
    bins = np.bincount(
        ((np.repeat(event, count) - clock[index] + window) / width).astype(np.int64), minlength=2
    )
    pairs = bins[:-1] + bins[1:]
    frequent = (np.flatnonzero(pairs >= 0.9 * pairs.max()) + 1) * width - window
    return float(frequent[np.abs(frequent).argmin()])


def _nearest(clock: Float64, times: Float64) -> Int64:
    after = (
        np.searchsorted(clock, times).clip(1, len(clock) - 1) if len(clock) > 1 else np.ones(len(times), int)
    )
    before = after - 1
    if len(clock) == 1:
        return before
    return np.where(times - clock[before] <= clock[after] - times, before, after)


def _require_everywhere(step: Int64, mine: Float64, theirs: Float64, at: Int64) -> None:
    """Raise UsageError if a part of the run fits clearly better when it is shifted."""
    for parts in PARTS:
        if parts > PARTS[0] and len(at) < parts * MIN_OVERLAP:
            return
        for part in np.array_split(np.arange(len(at)), parts):
            near = range(-NEIGHBORS, NEIGHBORS + 1)
            fits = {by: _Fit.of(mine[part], theirs, at[part] + by) for by in near}
            if parts == PARTS[0]:
                far = _far(mine[part], theirs, at[part])
                fits[far] = _Fit.of(mine[part], theirs, at[part] + far)
            found = {by: fit for by, fit in fits.items() if fit.is_same and not fits[0].is_similar}
            if parts == PARTS[0]:
                found |= {by: fits[by] for by in near if fits[by].score > fits[0].score + CLEARLY}
            if found:
                best = max(found, key=lambda by: found[by].score)
                first, last = (int(step[at[i]]) for i in (part[0], part[-1]))
                raise UsageError(
                    f"its step numbers drift from the recording's: steps {first}-{last} fit better with "
                    f"an offset of {best:+d}; split the file there"
                )


class _Fit(NamedTuple):
    """How well a part fits at one place.

    Attributes:
        score: its correlation, in standard errors; -inf if it does not vary.
        same: the share of values that are as large, which some outliers do not change.
    """

    score: float
    same: float

    @classmethod
    def of(cls, mine: Float64, theirs: Float64, there: Int64) -> _Fit:
        inside = (there >= 0) & (there < len(theirs))
        a, b = mine[inside], theirs[there[inside]]
        known = np.isfinite(a) & np.isfinite(b)
        score = float(standard_errors(correlation(a, b), int(known.sum())))
        same = float((np.abs(a - b) < AS_LARGE)[known].mean()) if known.any() else 0.0
        return cls(-np.inf if np.isnan(score) else score, same)

    @property
    def is_same(self) -> bool:
        return self.same > 0.8

    @property
    def is_similar(self) -> bool:
        return self.same > 0.5


def _far(mine: Float64, theirs: Float64, at: Int64) -> int:
    """By how much a part must be shifted to fit best, at any distance."""
    first = int(at.min())
    own = np.full(int(at.max()) + 1 - first, np.nan)
    own[at - first] = mine
    shift = best_shift(own, theirs, first)
    return 0 if shift is None else shift.by - first
