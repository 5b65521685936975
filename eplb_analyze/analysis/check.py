"""Is a dump complete and intact: everything is read once, verified, and judged."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from eplb_analyze.errors import Finding, Severity
from eplb_analyze.json_report import RunReport
from eplb_analyze.parallel import ordered_map, split_range
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.completeness import ABSENT, Completeness
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.placements import replicas
from eplb_analyze.reader.run import Run
from eplb_analyze.reader.run_info import imported
from eplb_analyze.reader.step_range import NO_END
from eplb_analyze.text import listed, plural
from eplb_dump.format.journal import Int32, Int64
from eplb_dump.format.schema import EMPTY_SLOT, FORMAT_NAME

#: Clocks of one cluster are set closer than this; ranks also take a step at slightly different times.
SKEW_SECONDS = 2.0
#: Clocks are compared at so many steps at each end of every segment.
CLOCK_SAMPLES = 16


@dataclass(frozen=True)
class CheckReport(RunReport):
    steps: Completeness
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """No finding is an error."""
        return all(f.severity != "error" for f in self.findings)

    def to_json(self) -> dict[str, Any]:
        return self.document({"ok": self.ok, "steps": self.steps, "findings": self.findings})


def check_run(run: Run) -> CheckReport:
    """Read every byte of a run, verified, and report all that is odd, the gravest first."""
    steps, found = run.retry_without_damaged(lambda: _check_blocks(run))
    for part in (_check_sums, _check_recorded, _check_clocks, _check_statements):
        found += run.retry_without_damaged(lambda part=part: part(run))  # type: ignore[misc]
    found += _check_ranks(run)
    found += check_steps(run, steps)
    found += _check_placements(run)
    found += _check_sessions(run)
    if run.info.origin is not None:
        found.append(Finding("info", "imported", imported(run.info.origin)))
    order = {"error": 0, "warning": 1, "info": 2}
    findings = list(dict.fromkeys([*run.findings, *found]))
    return CheckReport(
        run.info.run_id, run.info.model, steps, sorted(findings, key=lambda f: order[f.severity])
    )


def standing_findings(run: Run) -> list[Finding]:
    """What any command must say of a run it has read: faults met on the way, missing ranks, sessions
    that were not closed. Unlike :func:`check_run` it reads nothing more."""
    found = [*run.findings, *_check_ranks(run), *_check_sessions(run)]
    return list(dict.fromkeys(found))


def _check_blocks(run: Run) -> tuple[Completeness, list[Finding]]:
    """Read all loads: checksums, sums per rank, conservation, loads in empty slots."""
    steps = Completeness()
    bad_sums: list[int] = []
    unequal: list[int] = []
    on_empty: list[tuple[int, int]] = []
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
            for total, odd, filled in _check_layers(run, block, chosen):
                totals.append(total)
                bad_sums += odd
                on_empty += filled
            if chosen is numbers:
                total = np.concatenate(totals, axis=1)
                # A layer without any token is a dense one that the engine lists, too.
                total = total[:, total.any(axis=0)]
                if total.shape[1]:
                    unequal += chosen[total.max(axis=1) != total.min(axis=1)].tolist()
    return steps, list(_load_findings(run, bad_sums, unequal, on_empty))


def _check_layers(
    run: Run, block: Block, steps: Int64
) -> Iterator[tuple[Int64, list[int], list[tuple[int, int]]]]:
    """Of some layers each: tokens ``[steps, layers]``, steps of wrong sums, (layer, step) of empty slots."""
    assert block.shape is not None
    layers, ranks = block.shape.num_moe_layers, block.shape.ep_size
    run.load_history()  # not once in each thread

    def work(share: tuple[int, int]) -> tuple[Int64, list[int], list[tuple[int, int]]]:
        totals, odd, filled = [np.zeros((len(steps), 0), np.int64)], [], []
        parts = block.load_parts(steps, *share), block.rank_load_parts(steps, *share)
        for (first, loads), (_, rank_load) in zip(*parts, strict=True):
            sums = loads.reshape(*loads.shape[:2], ranks, -1).sum(axis=3)
            odd += steps[(sums != rank_load).any(axis=(1, 2))].tolist()
            totals.append(rank_load.sum(axis=2))
            for layer, load in enumerate(loads.transpose(1, 0, 2), first):
                filled += [(layer, step) for step in _loads_on_empty(run, layer, steps, load)]
        return np.concatenate(totals, axis=1), odd, filled

    # Layers have nothing to do with each other, so threads can share them.
    return (result for _, result in ordered_map(work, split_range(0, layers)))


def _loads_on_empty(run: Run, layer: int, steps: Int64, load: Int64) -> list[int]:
    found: list[int] = []
    for stretch, slots in run.history.layer(layer).periods(steps):
        if slots is not None and len(slots) == load.shape[1] and (slots == EMPTY_SLOT).any():
            odd = load[stretch][:, slots == EMPTY_SLOT].any(axis=1)
            found += steps[stretch][odd].tolist()
    return found


def _load_findings(
    run: Run, bad_sums: list[int], unequal: list[int], on_empty: list[tuple[int, int]]
) -> Iterator[Finding]:
    if bad_sums:
        text = f"rank_load is not the sum of load in {_steps_text(bad_sums)}"
        yield Finding("error", "rank_load_mismatch", text)
    if unequal:
        text = f"layers got different numbers of tokens in {_steps_text(unequal)}; each step's sum over slots"
        text += " is tokens × top-k and the same for all layers of a model"
        yield Finding("error", "conservation", text)
    if on_empty:
        layer, step = on_empty[0]
        text = f"tokens on empty slots, in {len(on_empty)} layer-steps, the first in layer "
        text += f"{run.info.layers[layer]} at step {step}"
        yield Finding("error", "load_on_empty_slot", text)


def _check_ranks(run: Run) -> Iterator[Finding]:
    missing = sorted(set(run.expected_ranks) - set(run.present_ranks))
    if missing:
        text = f"of {len(run.expected_ranks)} ranks, {_ranks(missing)} wrote nothing"
        yield Finding("error", "missing_ranks", text)
    if run.scope.value == "global" and len(run.present_ranks) > 1:
        text = f"ranks {listed(run.present_ranks)} all wrote global sums; rank {run.present_ranks[0]}'s count"
        yield Finding("warning", "several_global_writers", text)


def check_steps(run: Run, steps: Completeness) -> Iterator[Finding]:
    """What the states of the steps say: nothing but their completeness is looked at."""
    if not steps.seen:
        yield Finding("error", "no_steps", "no step was recorded")
        return
    incomplete = steps.count(StepState.INCOMPLETE)
    last = {rank: steps.last_of_rank.get(rank) for rank in run.expected_ranks}
    short = {rank: step for rank, step in last.items() if step is None or step < (steps.last or 0)}
    # Where no rank ended early, the last steps lack one for the reasons for which others do.
    inside = steps.incomplete_inside if short else incomplete
    if inside:
        lack = "lacks" if inside == 1 else "lack"
        text = f"{plural(inside, 'step')} {lack} a rank and are in no figure: {steps.why_incomplete()}"
        minor = steps.accounted_for and not steps.lacks_much
        yield Finding("warning" if minor else "error", "incomplete_steps", text)
    if incomplete > inside:
        yield _incomplete_tail(run, steps, incomplete - inside, short)
    if steps.missing:
        gaps = ", ".join(f"{a}–{b}" if a < b else f"{a}" for a, b in steps.gaps[:5])
        more = " …" if len(steps.gaps) > 5 else ""
        text = f"no rank saw {plural(steps.missing, 'step')}, or the engine's numbers jump: {gaps}{more}"
        yield Finding("warning", "missing_steps", text)
    lost = _lost_in_source(run)
    yield from lost
    dropped = "the queue was full or recording was off; see the writer's stats"
    if lost:
        dropped = "in the run it was made of they lacked a rank, or were dropped"
    for state, remedy in (
        (StepState.DROPPED, dropped),
        (StepState.REJECTED, "the engine handed over what cannot be a load"),
    ):
        if steps.count(state):
            were = "was" if steps.count(state) == 1 else "were"
            text = f"{plural(steps.count(state), 'step')} {were} {state.label}: {remedy}"
            yield Finding("warning", f"{state.label}_steps", text)
    if not steps.count(StepState.RECORDED):
        states = (StepState.INCOMPLETE, StepState.REJECTED, StepState.DROPPED)
        why = ", ".join(f"{steps.count(s):,} {s.label}" for s in states if steps.count(s))
        text = "no step is complete" + (f" ({why})" if why else "") + ", so there are no figures"
        yield Finding("error", "no_complete_step", text)


def _lost_in_source(run: Run) -> list[Finding]:
    """Steps of a compacted run that are `dropped` since its source lacks a rank's part of them."""
    origin = run.info.origin
    if origin is None or origin.system != FORMAT_NAME:
        return []
    severities: dict[str, Severity] = {"incomplete_steps": "error", "incomplete_end": "warning"}
    return [
        Finding(s, code, origin.unknown[code]) for code, s in severities.items() if code in origin.unknown
    ]


def _incomplete_tail(run: Run, steps: Completeness, tail: int, short: dict[int, int | None]) -> Finding:
    """The last steps lack ranks: because all were killed, or because some rank stopped and others not.

    Args:
        short: the ranks that ended before the run's last step, and the last that each accounted for.
    """
    stops = ", ".join(
        f"rank {rank} has none" + ("" if step is None else f" after {step}")
        for rank, step in [*short.items()][:4]
    )
    text = "the last step lacks" if tail == 1 else f"the last {tail:,} steps lack"
    text += f" ranks: {stops}"
    text += f" and {plural(len(short) - 4, 'more rank')}" if len(short) > 4 else ""
    if not steps.incomplete_inside and any(why != ABSENT for _, why in steps.reasons):
        text += f" ({steps.why_incomplete()})"
    closed = {s.info.ep_rank for s in run.sessions if s.closed is not None}
    survived = bool(closed) and not set(short) <= closed
    if not steps.ends_together or survived or not steps.count(StepState.RECORDED):
        return Finding("error", "rank_stopped", text)
    if closed < set(run.present_ranks):
        return Finding("warning", "incomplete_end", text + "; a killed engine's ranks do not end at one step")
    # Nobody was killed: ranks that end in order differ by a step or a few.
    if steps.lacks_much:
        return Finding("error", "rank_stopped", text)
    return Finding("warning", "incomplete_end", text + "; ranks that end in order do not end at one step")


def summary_findings(run: Run, steps: Completeness) -> list[Finding]:
    """:func:`standing_findings`, and what the steps read say; an error where figures leave out much."""
    codes = {"incomplete_steps", "rank_stopped", "incomplete_end"}
    # A run in which all ranks idled is whole, and has nothing to show.
    if steps.count(StepState.REJECTED) or steps.count(StepState.DROPPED):
        codes.add("no_complete_step")
    found = [f for f in check_steps(run, steps) if f.code in codes]
    standing = standing_findings(run)
    explained = any(f.severity == "error" for f in standing)
    too_much = not explained and steps.lacks_much
    nothing = any(f.code == "no_complete_step" for f in found)
    severity: Severity = "error" if too_much or nothing else "warning"
    return [*standing, *(Finding(severity, f.code, f.text) for f in found)]


def _check_placements(run: Run) -> Iterator[Finding]:
    known = 0
    absent: list[str] = []
    doubled: list[str] = []
    for index, number in enumerate(run.info.layers):
        history = run.history.layer(index)
        known += bool(history.steps)
        for step, ep_size, slots in zip(history.steps, history.ep_sizes, history.slots, strict=True):
            where = f"layer {number} from step {step} on"
            without = np.flatnonzero(replicas(slots, run.info.num_logical_experts) == 0)
            if len(without):
                absent.append(f"{where}: expert {listed(without.tolist())}")
            ranks = np.sort(slots.reshape(ep_size, -1), axis=1)
            twice = (np.diff(ranks, axis=1) == 0) & (ranks[:, 1:] != EMPTY_SLOT)
            if twice.any():
                doubled.append(f"{where}: rank {int(np.flatnonzero(twice.any(axis=1))[0])}")
    if absent:
        yield Finding("error", "expert_without_slot", f"no slot holds an expert, {_first_of(absent)}")
    if doubled:
        text = f"a rank holds an expert twice, which balances nothing, {_first_of(doubled)}"
        yield Finding("warning", "replica_on_same_rank", text)
    if known < len(run.info.layers) and not run.history.lost:
        unknown, all_layers = len(run.info.layers) - known, len(run.info.layers)
        text = f"{unknown} of {all_layers} layers have no placement: the engine gave none"
        yield Finding("warning", "no_placement", text)


def _first_of(places: list[str]) -> str:
    return places[0] if len(places) == 1 else f"in {len(places)} placements, the first in {places[0]}"


def _check_sessions(run: Run) -> Iterator[Finding]:
    unclosed = [s for s in run.sessions if s.closed is None]
    if unclosed:
        ranks = sorted({s.info.ep_rank for s in unclosed})
        text = (
            f"{len(unclosed)} of {len(run.sessions)} sessions not closed (killed, or still being written): "
        )
        text += _ranks(ranks)
        yield Finding("warning", "not_closed", text)
    part = next((s.part for s in run.sessions if s.part is not None), None)
    if part is not None:
        end = "the end" if part[1] >= NO_END - 1 else str(part[1])
        text = f"a copy of a part of the run: the segments that touch steps {part[0]} to {end}"
        yield Finding("info", "partial_copy", text)
    journals = sum(s.journals for s in run.sessions)
    if journals:
        text = f"{plural(journals, 'journal')} not sealed: read here, but not by other programs (see `seal`)"
        yield Finding("info", "unsealed_journal", text)
    for rank in run.present_ranks:
        own = [s for s in run.sessions if s.info.ep_rank == rank and s.segments]
        for older, newer in itertools.pairwise(own):
            start = max(min(s.first_step for s in session.segments) for session in (older, newer))
            last = min(older.last_step, newer.last_step)
            if start <= last:
                text = f"rank {rank} has two sessions with steps {start} to {last}; where both "
                text += f"recorded a step, the newer one counts ({newer.info.session_id})"
                yield Finding("warning", "overlapping_sessions", text)


def _check_sums(run: Run) -> list[Finding]:
    """What the manifests say of loads must be what the loads say. Raises DamagedSegmentError."""
    odd = [
        segment.path
        for session in run.sessions
        for segment in session.segments
        if run.readable(segment) and not segment.sums_are_true()
    ]
    text = "the manifest's sums are not those of the loads, in "
    return [Finding("error", "sums_differ", text + str(path)) for path in dict.fromkeys(odd)]


def _check_recorded(run: Run) -> list[Finding]:
    """What `steps` calls recorded must be in `loads`, and nothing else. Raises DamagedSegmentError."""
    odd = []
    for session in run.sessions:
        for segment in filter(run.readable, session.segments):
            rows = segment.steps()
            if not np.array_equal(rows.step[rows.status == StepState.RECORDED], segment.load_steps()):
                odd.append(segment.path)
    text = "`steps` and `loads` do not tell of the same steps, in "
    return [Finding("error", "steps_differ", text + str(path)) for path in dict.fromkeys(odd)]


def _check_clocks(run: Run) -> list[Finding]:
    """Ranks take a step together: where their clocks say otherwise, a clock or the run is not one."""
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
    shown = ", ".join(f"rank {rank} by {s:+,.1f} s" for rank, s in sorted(ranks.items())[:4])
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    text = f"at the same steps ranks' clocks differ from the others', {shown}{more}: clocks that are not set "
    return [Finding("warning", "clock_skew", text + "alike, or two engine starts under one run id")]


def _check_statements(run: Run) -> list[Finding]:
    """Ranks that kept an old placement after the others had a new one. Raises DamagedSegmentError."""
    found: list[tuple[int, int, int]] = []
    for session in run.sessions:
        if run.placement_gaps(session):
            continue  # it may have stated what cannot be read
        own: dict[int, list[tuple[int, Int32]]] = {}
        for segment in (*session.segments, *session.lost):
            rows = segment.placements()
            for layer, step, slots in zip(
                rows.layer.tolist(), rows.step.tolist(), rows.physical_to_logical, strict=True
            ):
                own.setdefault(layer, []).append((step, slots))
        readable = [s for s in session.segments if run.readable(s)]
        loads = np.sort(np.concatenate([np.empty(0, np.int64), *(s.load_steps() for s in readable)]))
        for layer, stated in own.items():
            stated.sort(key=lambda row: row[0])
            history = run.history.layer(layer)
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
    text = f"ranks recorded under an old placement after others stated a new one, in {len(found)} cases, the "
    text += f"first rank {rank} in layer {run.info.layers[layer]} at step {step}"
    return [Finding("error", "placement_not_adopted", text)]


def _steps_text(steps: list[int]) -> str:
    unique = sorted(set(steps))
    return f"{len(unique):,} steps, the first {unique[0]}" if len(unique) > 1 else f"step {unique[0]}"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks)}"
