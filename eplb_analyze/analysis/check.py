"""Is a dump complete and intact: everything is read once, verified, and judged."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.analysis.conservation import Conservation, steps_text
from eplb_analyze.analysis.findings import rank_findings, session_findings, step_findings
from eplb_analyze.errors import Finding
from eplb_analyze.json_report import RunReport, remembers_run
from eplb_analyze.parallel import ordered_map
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.placements import LayerHistory, replicas
from eplb_analyze.reader.run import Run
from eplb_analyze.reader.run_info import imported
from eplb_analyze.sessions.parquet_segment import ParquetSegment
from eplb_analyze.sessions.segments import Segment
from eplb_analyze.sessions.step_range import NO_END
from eplb_analyze.text import listed
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int32, Int64, Shape, rank_loads
from eplb_dump.format.schema import EMPTY_SLOT, MINUTES_SCHEMA

#: Clocks of one cluster are set closer than this; ranks also take a step at slightly different times.
SKEW_SECONDS = 2.0
#: Clocks are compared at this many steps at each end of every segment.
CLOCK_SAMPLES = 16


@frozen
class CheckReport(RunReport):
    """Which steps a run has, and what is damaged, missing or contradictory in its files."""

    steps: Completeness
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """No finding is an error."""
        return all(f.severity != "error" for f in self.findings)

    def to_json(self) -> dict[str, Any]:
        return self.document({"ok": self.ok, "steps": self.steps, "findings": self.findings})


@remembers_run
def check_run(run: Run) -> CheckReport:
    """Read and verify every byte of a run, and report all problems, errors first."""
    steps, found, true_sums = run.retry_without_damaged(lambda: _check_blocks(run))

    def check_sums(run: Run) -> list[Finding]:
        return _check_sums(run, true_sums)

    parts = _check_others, check_sums, _check_minutes, _check_recorded, _check_clocks, _check_statements
    for part in parts:
        found += run.retry_without_damaged(lambda part=part: part(run))  # type: ignore[misc]
    found += rank_findings(run)
    found += step_findings(run, steps)
    found += _check_placements(run)
    found += session_findings(run)
    if run.info.origin is not None:
        found.append(Finding("info", "imported", imported(run.info.origin)))
    order = {"error": 0, "warning": 1, "info": 2}
    findings = list(dict.fromkeys([*run.findings, *found]))
    return CheckReport(
        run.info.run_id, run.info.model, steps, sorted(findings, key=lambda f: order[f.severity])
    )


def _check_blocks(run: Run) -> tuple[Completeness, list[Finding], dict[int, bool]]:
    """Read all loads: verify checksums, sums per rank, conservation and empty slots.

    Returns also, by the ``id`` of segments that are the only ones of their steps, whether their sums in the
    manifest are true.
    """
    steps = Completeness()
    true_sums: dict[int, bool] = {}
    bad_sums: list[int] = []
    on_empty: list[tuple[int, int]] = []
    conservation = Conservation()
    for block in run.blocks():
        steps.add(block)
        if block.shape is None:
            continue
        numbers = block.recorded
        # Incomplete steps are read, too: their bytes are evidence, and must be intact.
        partial = block.step[
            (block.state == StepState.INCOMPLETE) & (block.status == StepState.RECORDED).any(axis=0)
        ]
        for chosen in (numbers, partial):
            if not len(chosen):
                continue
            totals = []
            segment = _only_segment(block, chosen)
            for total, odd, filled, true in _check_layers(run, block, chosen, segment):
                totals.append(total)
                if segment is not None:
                    true_sums[id(segment)] = true_sums.get(id(segment), True) and true
                bad_sums += odd
                on_empty += filled
            if chosen is numbers:
                stated = block.num_tokens[block.state == StepState.RECORDED]
                conservation.add(chosen, np.concatenate(totals, axis=1), stated)
    found = [*_load_findings(run, bad_sums, on_empty), *conservation.findings(run)]
    return steps, found, true_sums


def _only_segment(block: Block, steps: Int64) -> Segment | None:
    """The segment whose loads are those of some steps, and of no others; None if there are several."""
    if not block.has_loads:
        return None
    matched = [*block.matches(steps)]
    if len(matched) != 1:
        return None
    segment, here, _ = matched[0]
    return segment if len(here) == len(steps) == len(segment.load_steps()) else None


#: Of some layers: tokens ``[steps, layers]``, steps of wrong sums per rank, (layer, step) of tokens on empty
#: slots, and whether the segment's sums are true.
_Checked = tuple[Int64, list[int], list[tuple[int, int]], bool]


def _check_layers(run: Run, block: Block, steps: Int64, segment: Segment | None) -> Iterator[_Checked]:
    """``segment``: the only one that has these steps, and no others."""
    assert block.shape is not None
    ranks = block.shape.ep_size
    if not block.has_loads:
        return iter([(block.rank_load(steps).sum(axis=2), [], [], True)])
    run.load_history()  # not once in each thread

    def work(share: tuple[int, int]) -> _Checked:
        totals, odd, filled, true = [np.zeros((len(steps), 0), np.int64)], [], [], True
        parts = block.stored_parts(steps, *share), block.rank_load_parts(steps, *share)
        for (first, loads), (_, rank_load) in zip(*parts, strict=True):
            sums = rank_loads(loads, ranks).transpose(1, 0, 2)
            odd += steps[(sums != rank_load).any(axis=(1, 2))].tolist()
            totals.append(rank_load.sum(axis=2))
            for layer, load in enumerate(loads, first):
                filled += [(layer, step) for step in _loads_on_empty(run, layer, steps, load)]
                true = true and (segment is None or segment.layer_sums_are_true(layer, load))
        return np.concatenate(totals, axis=1), odd, filled, true

    # Layers have nothing to do with each other, so threads can share them.
    return (result for _, result in ordered_map(work, block.layer_shares()))


def _loads_on_empty(run: Run, layer: int, steps: Int64, load: npt.NDArray[Any]) -> list[int]:
    found: list[int] = []
    for stretch, slots in run.history.layer(layer).periods(steps):
        if slots is not None and len(slots) == load.shape[1] and (slots == EMPTY_SLOT).any():
            odd = load[stretch][:, slots == EMPTY_SLOT].any(axis=1)
            found += steps[stretch][odd].tolist()
    return found


def _load_findings(run: Run, bad_sums: list[int], on_empty: list[tuple[int, int]]) -> Iterator[Finding]:
    if bad_sums:
        text = f"rank_load is not the sum of load in {steps_text(bad_sums)}"
        yield Finding("error", "rank_load_mismatch", text)
    if on_empty:
        layer, step = on_empty[0]
        text = f"tokens on empty slots in {len(on_empty)} layer-steps, first in layer "
        text += f"{run.info.layers[layer]} at step {step}"
        yield Finding("error", "load_on_empty_slot", text)


def _check_placements(run: Run) -> Iterator[Finding]:
    known = 0
    absent: list[str] = []
    doubled: list[str] = []
    experts = run.history.num_experts(run.info.num_logical_experts, run.info.num_layers).tolist()
    for index, number in enumerate(run.info.layers):
        history = run.history.layer(index)
        known += bool(history.steps)
        for step, ep_size, slots in zip(history.steps, history.ep_sizes, history.slots, strict=True):
            where = f"layer {number} from step {step} on"
            without = np.flatnonzero(replicas(slots, run.info.num_logical_experts)[: experts[index]] == 0)
            if len(without):
                absent.append(f"{where}: expert {listed(without.tolist())}")
            ranks = np.sort(slots.reshape(ep_size, -1), axis=1)
            twice = (np.diff(ranks, axis=1) == 0) & (ranks[:, 1:] != EMPTY_SLOT)
            if twice.any():
                doubled.append(f"{where}: rank {int(np.flatnonzero(twice.any(axis=1))[0])}")
    if absent:
        yield Finding("error", "expert_without_slot", f"some experts have no slot, {_first_of(absent)}")
    if doubled:
        text = f"a rank holds an expert twice, which does not improve balance, {_first_of(doubled)}"
        yield Finding("warning", "replica_on_same_rank", text)
    if fewer := [n for n, own in zip(run.info.layers, experts, strict=True) if own < max(experts)]:
        text = f"layers have different numbers of experts ({min(experts)} to {max(experts)}); fewer than the "
        text += f"others: {listed(fewer)}"
        yield Finding("info", "experts_differ", text)
    if known < len(run.info.layers) and not run.history.lost:
        unknown, all_layers = len(run.info.layers) - known, len(run.info.layers)
        text = f"{unknown} of {all_layers} layers have no placement, because the engine did not pass one"
        yield Finding("warning", "no_placement", text)


def _first_of(places: list[str]) -> str:
    return places[0] if len(places) == 1 else f"in {len(places)} placements, the first in {places[0]}"


def _check_sums(run: Run, known: dict[int, bool]) -> list[Finding]:
    """What the manifests say of loads must be what the loads say. Raises DamagedSegmentError.

    ``known``: by the ``id`` of segments, whether it is so.
    """

    def true(segment: Segment) -> bool:
        return known[id(segment)] if id(segment) in known else segment.sums_are_true()

    odd = [
        segment.path
        for session in run.sessions
        for segment in session.segments
        if run.readable(segment) and not true(segment)
    ]
    text = "the manifest's sums do not match the loads, in "
    return [Finding("error", "sums_differ", text + str(path)) for path in dict.fromkeys(odd)]


def _check_others(run: Run) -> list[Finding]:
    """Verify files of steps that are in no block, because another rank's part of them was retired.

    Raises DamagedSegmentError.
    """
    for session in run.sessions:
        for segment in filter(run.readable, session.segments):
            if not run.tiers.retired.overlaps(segment.first_step, segment.last_step + 1):
                continue
            segment.steps()
            if segment.shape is not None:
                read = segment.loads if segment.has_loads else segment.rank_loads
                for _ in read(0, segment.shape.num_moe_layers):
                    pass
    return []


def _check_minutes(run: Run) -> list[Finding]:
    """Sums per minute must be those of the steps they are of, as far as these are kept.

    Raises DamagedSegmentError.
    """
    odd = []
    for session in run.sessions:
        for segment in (*session.retired, *session.segments):
            if not isinstance(segment, ParquetSegment) or not run.readable(segment, "minutes"):
                continue
            if not segment.has_minutes:
                continue
            recorded, sums = 0, np.int64(0)
            for rows in segment.minutes(MINUTES_SCHEMA.names):  # which checks every checksum
                recorded += int(rows["recorded"].sum())
                sums = sums + rows["rank_load"].sum(axis=0)
            right = recorded == segment.recorded
            if right and segment.shape is not None and segment.step_rows and run.readable(segment):
                layers = segment.shape.num_moe_layers
                right = np.array_equal(sums.reshape(layers, -1), _rank_sums(segment, segment.shape))
            if not right:
                odd.append(segment.file_path("minutes"))
    text = "the sums per minute do not match the steps, in "
    return [Finding("error", "minutes_differ", text + str(path)) for path in odd]


def _rank_sums(segment: ParquetSegment, shape: Shape) -> Int64:
    """Tokens on each EP rank over a segment: int64 ``[layers, ep_size]``. Raises DamagedSegmentError."""
    out = np.zeros((shape.num_moe_layers, shape.ep_size), np.int64)
    if (sums := segment.sums) is not None:
        np.add.at(out, sums.layer, sums.load.reshape(-1, *out.shape[1:], shape.slots_per_rank).sum(axis=2))
        return out
    for layer, load in segment.rank_loads(0, shape.num_moe_layers):
        out[layer : layer + len(load)] = load.sum(axis=1)
    return out


def _check_recorded(run: Run) -> list[Finding]:
    """What `steps` calls recorded must be in `loads`, and nothing else. Raises DamagedSegmentError."""
    odd = []
    for session in run.sessions:
        for segment in filter(run.readable, session.segments):
            rows = segment.steps()
            if not np.array_equal(rows.step[rows.status == StepState.RECORDED], segment.load_steps()):
                odd.append(segment.path)
    text = "`steps` and `loads` list different steps, in "
    return [Finding("error", "steps_differ", text + str(path)) for path in dict.fromkeys(odd)]


def _check_clocks(run: Run) -> list[Finding]:
    """Ranks take a step together. If their times differ, a clock is wrong or these are several runs."""
    sampled: dict[int, list[tuple[int, float]]] = {}
    for number, session in enumerate(run.sessions):
        offset = session.info.created_unix_ns - session.info.created_monotonic_ns
        for segment in session.segments:
            rows = segment.steps()
            some = (
                np.r_[0:CLOCK_SAMPLES, -CLOCK_SAMPLES:0]
                if len(rows.step) > 2 * CLOCK_SAMPLES
                else slice(None)
            )
            for step, clock in zip(rows.step[some].tolist(), rows.monotonic_ns[some].tolist(), strict=True):
                sampled.setdefault(step, []).append((number, (clock + offset) / 1e9))
    off: dict[int, list[float]] = {}
    for clocks in sampled.values():
        middle = float(np.median([seconds for _, seconds in clocks]))
        for number, seconds in clocks if len(clocks) > 1 else ():
            off.setdefault(number, []).append(seconds - middle)
    skew = {number: float(np.median(values)) for number, values in off.items()}
    ranks = {run.sessions[n].info.ep_rank: s for n, s in skew.items() if abs(s) > SKEW_SECONDS}
    if not ranks:
        return []
    shown = listed([f"rank {rank} by {s:+,.1f} s" for rank, s in sorted(ranks.items())], 4)
    text = (
        f"the clocks of ranks disagree at the same steps, {shown}: either the clocks are not synchronized, "
    )
    return [Finding("warning", "clock_skew", text + "or two engine starts share one run id")]


def _check_statements(run: Run) -> list[Finding]:
    """Ranks that kept an old placement after the others had a new one. Raises DamagedSegmentError."""
    found: list[tuple[int, int, int]] = []
    for session in run.sessions:
        if run.placement_gaps(session):
            continue  # it may have stated what cannot be read
        own: dict[int, list[tuple[int, Int32]]] = {}
        for segment in (*session.retired, *session.segments, *session.lost):
            rows = segment.placements()
            for layer, step, slots in zip(
                rows.layer.tolist(), rows.step.tolist(), rows.physical_to_logical, strict=True
            ):
                own.setdefault(layer, []).append((step, slots))
        readable = [s for s in session.segments if run.readable(s)]
        loads = np.sort(np.concatenate([np.empty(0, np.int64), *(s.load_steps() for s in readable)]))
        for layer, stated in own.items():
            stated.sort(key=lambda row: row[0])
            history = run.history.stated.get(layer, LayerHistory())
            for (start, slots), (until, _) in itertools.pairwise([*stated, (NO_END, stated[-1][1])]):
                # Until the others change again: it may be back to what this rank still has.
                ends = [*history.steps[1:], NO_END][: len(history.steps)]
                for change, end, now in zip(history.steps, ends, history.slots, strict=True):
                    if start < change < until and not np.array_equal(now, slots):
                        late = loads[(loads >= change) & (loads < min(end, until))]
                        if len(late):
                            found.append((session.info.ep_rank, layer, int(late[0])))
                            break
    if not found:
        return []
    rank, layer, step = min(found, key=lambda f: (f[2], f[0], f[1]))
    text = "ranks recorded under an old placement after other ranks recorded a new one, in "
    text += f"{len(found)} cases, the first rank {rank} in layer {run.info.layers[layer]} at step {step}"
    return [Finding("error", "placement_not_adopted", text)]
