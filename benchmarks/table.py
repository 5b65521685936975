"""Every figure that this project promises, beside its goal and its peer, as one Markdown table.

    python -m benchmarks.table [--only NAME ...] [--quick] [--suite]

Each row is measured here and now; each peer or physical limit in the same run. What this machine cannot
measure is a row that says so. ``--quick`` measures too little for a verdict, to try the program out.
``--suite`` also runs the project's tests. Details and the rows of each group, once measured, go to stderr;
the table goes to stdout at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from benchmarks.figure import Figure, machine, table

STEPS = 20_000
LOCAL_STEPS = 1_000


def record_cpu(quick: bool) -> Iterator[Figure]:
    from benchmarks import hot_path

    with tempfile.TemporaryDirectory() as folder:
        rows = hot_path.cpu(folder, 600 if quick else 3000, 2.0)
    bare = rows["bare copy_ into a host buffer"]
    for name in ("torch tensors", "numpy arrays"):
        took = rows[f"record, {name}"]
        yield Figure(
            f"`record`, CPU {name}, one step every 2 ms of busy Python",
            "p50 ≤ 20 µs, p99 ≤ 100 µs",
            f"{took.p50:.1f} µs, p99 {took.p99:.0f} µs, {took.dropped} steps dropped",
            f"a bare copy into a host buffer: {bare.p50:.1f} µs, p99 {bare.p99:.0f} µs",
            took.p50 <= 20 and took.p99 <= 100 and not took.dropped,
        )


def record_cuda(quick: bool) -> Iterator[Figure]:
    import torch

    from benchmarks import hot_path

    goal = "≤ 1.5x a bare copy and event in every run"
    if not torch.cuda.is_available():
        for what, own in (
            ("`record`, CUDA tensors", goal),
            ("synchronizations", "0"),
            ("steps dropped by a pure-Python engine thread at 500 steps/s", "0"),
        ):
            yield Figure(what, own, "not measured: no CUDA device", "", None)
        return
    runs = []
    for _ in range(1 if quick else 3):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(hot_path.cuda(folder, "cuda", 600 if quick else 3000, 2.0))
    for state, what, name in (
        ("back to back", "record", "bare copy_ + event.record()"),
        ("idle", "record", "bare copy_(non_blocking) + event.record()"),
        ("busy", "record", "bare copy_(non_blocking) + event.record()"),
        ("idle", "begin_step and record", "bare copy_(non_blocking) + event.record()"),
        ("busy", "begin_step and record", "bare copy_(non_blocking) + event.record()"),
    ):
        took, bare = ([rows[f"{state}: {own}"] for rows in runs] for own in (what, name))
        synchronous = [rows["busy: .cpu(), as SGLang's per-pass recorder"] for rows in runs]
        yield Figure(
            f"`{what.replace(' and ', '` and `')}`, CUDA tensors, {state}",
            goal,
            f"{_range([t.ratio for t in took], '.2f')}x, {_range([t.p50 for t in took], '.1f')} µs, "
            f"p99 {_range([t.p99 for t in took], '.0f')} µs",
            f"a bare copy and event: {_range([t.p50 for t in bare], '.1f')} µs; "
            f"a synchronous copy: {_range([t.p50 for t in synchronous], ',.0f')} µs",
            max(t.ratio for t in took) <= 1.5,
        )
    # Torch's check raises in `hot_path`, but sees only torch's own calls. Who waits for a device that is busy
    # for 2 ms takes as long as a synchronous copy.
    slow = max(rows["busy: record"].p99 for rows in runs)
    least = min(rows["busy: .cpu(), as SGLang's per-pass recorder"].p50 for rows in runs)
    yield Figure(
        "synchronizations",
        "0",
        f"none that torch sees; behind a kernel of 2 ms, p99 is {slow:.0f} µs",
        f"a synchronous copy: {least:,.0f} µs",
        slow < least / 2,
    )
    dropped = [rows["idle: record"].dropped for rows in runs]
    yield Figure(
        "steps dropped by a pure-Python engine thread at 500 steps/s",
        "0",
        f"{sum(dropped)} in {len(runs)} runs",
        "",
        not sum(dropped),
    )


def _range(values: list[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def engine(_quick: bool) -> Iterator[Figure]:
    yield Figure(
        "a real engine on GPUs: tokens/s with the plugin, as a share of those without",
        "≥ 0.995",
        "`sh scripts/real_vllm_gpu.sh` measures it",
        "two engines without the plugin, in turns",
        None,
    )


def loop(quick: bool) -> Iterator[Figure]:
    from benchmarks import writer

    found = writer.loop(*((3, 60) if quick else (5, writer.SEGMENT_STEPS)))
    for name in ("pure Python", "torch matmul"):
        on, copy, again = (
            "{1:+.2f}% [{0:+.2f} … {2:+.2f}]".format(*found[name, state])
            for state in ("writer on", "a copy into a host buffer alone", "off again")
        )
        yield Figure(
            f"engine loop of 5 ms steps ({name}), writer on against off",
            "≤ 0.5% slower",
            on,
            f"a copy into a host buffer alone: {copy}; off again: {again}",
            found[name, "writer on"][1] <= 0.5,
        )


def sustained(quick: bool) -> Iterator[Figure]:
    from benchmarks import writer

    journal, sealed, plain, dropped = writer.sustained(5 if quick else 20)
    yield Figure(
        "sustained, nothing dropped",
        "≥ 2,500 steps/s",
        f"{sealed:,.0f} steps/s sealed, {journal:,.0f} into the journal, {dropped} dropped",
        f"raw tensors to a plain file: {plain:,.0f} steps/s",
        sealed >= 2500 and not dropped,
    )


def size(quick: bool) -> Iterator[Figure]:
    from benchmarks import writer

    for name, found in writer.size(256 if quick else 1024).items():
        yield Figure(
            f"bytes per step: {name}",
            "≤ 1.7x the entropy",
            f"{found['eplb_dump']:.2f}x",
            f"npz {found['npz']:.2f}x, torch.save {found['torch.save']:.2f}x",
            found["eplb_dump"] <= 1.7,
        )


def reading(quick: bool) -> Iterator[Figure]:
    from benchmarks import analyze, batch

    steps, repeat = (4000, 1) if quick else (STEPS, 5)
    # The goals are for two processors; the commands would use more, and the peers would not.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory() as folder:
        analyze.apart(batch.make_long, long := Path(folder) / "long", 4 * steps)
        _, memory_of_long = analyze.measure([analyze.program(), "summary", str(long)], 1)
        shutil.rmtree(long)
        analyze.apart(analyze.make, dump := Path(folder) / "dump", steps)
        found = analyze.compare(dump, repeat)
        analyze.apart(analyze.make, few := Path(folder) / "few", 100)
        start, _ = analyze.measure([analyze.program(), "summary", str(few)], repeat)
    decode = found["decode"][0]
    peer = f"pyarrow decodes `load` on one thread in {decode:.2f} s"
    seconds, memory = found["summary"]
    duckdb = found.get("DuckDB: of rank_load")
    yield Figure(
        f"`summary`, {steps:,} steps",
        "as fast as DuckDB's balancedness alone",
        f"{seconds:.2f} s",
        ("DuckDB is not installed" if duckdb is None else f"DuckDB: {duckdb[0]:.2f} s, {duckdb[1]:.0f} MiB")
        + f"; `summary` of 100 steps: {start:.2f} s",
        None if duckdb is None else seconds <= duckdb[0],
    )
    yield Figure(
        "… its memory",
        "≤ 200 MB (191 MiB), and flat",
        f"{memory:.0f} MiB",
        f"of {4 * steps:,} steps: {memory_of_long:.0f} MiB",
        memory <= 200e6 / 2**20 and memory_of_long <= 1.1 * memory,
    )
    for name, most in (("experts", 1.2), ("rearrangements", 1.5)):
        seconds, memory = found[name]
        yield Figure(
            f"`{name}`, {steps:,} steps",
            f"≤ {most}x pyarrow's decode of `load`",
            f"{seconds / decode:.2f}x, {seconds:.2f} s, {memory:.0f} MiB",
            peer,
            seconds / decode <= most,
        )
    yield _layer(f"`layer 12 --step 400`, {steps:,} steps", found)
    seconds, memory = found["report"]
    yield Figure(
        f"`report`, {steps:,} steps", "≤ 3 s", f"{seconds:.2f} s, {memory:.0f} MiB", peer, seconds <= 3
    )
    with tempfile.TemporaryDirectory() as folder:
        analyze.apart(analyze.make_local, dump := Path(folder) / "dump", 500 if quick else LOCAL_STEPS)
        yield _layer("`layer 12 --step 400`, 32 local ranks", analyze.compare(dump, repeat))


def _layer(what: str, found: dict[str, tuple[float, float]]) -> Figure:
    seconds, memory = found["layer 12 --step 400"]
    beside = f"pyarrow decodes `load` of all steps in {found['decode'][0]:.2f} s"
    return Figure(what, "≤ 0.35 s", f"{seconds:.2f} s, {memory:.0f} MiB", beside, seconds <= 0.35)


def workers(quick: bool) -> Iterator[Figure]:
    from benchmarks import batch

    yield from batch.figures(quick)


def planted_incidents(quick: bool) -> Iterator[Figure]:
    from benchmarks import incidents

    runs = 40 if quick else 400
    tally, alarms = incidents.evaluate(incidents.by_sums, runs, runs, incidents.CELLS)
    right, counted = tally.right.total(), tally.counted.total()
    yield Figure(
        "planted incidents found: edges within 2 steps, right layer, rank, expert and cause",
        "≥ 95%",
        f"{right / counted:.1%} ({right} of {counted})",
        f"{tally.planted.total()} were planted; the effect of the others is too small to count",
        right / counted >= 0.95,
    )
    yield Figure(
        "clean runs with an incident", "≤ 2%", f"{alarms / runs:.1%} ({alarms} of {runs})", "",
        alarms / runs <= 0.02,
    )  # fmt: skip


def planted_costs(quick: bool) -> Iterator[Figure]:
    from benchmarks import cost

    others = [kind for kind in cost.KINDS if kind != "flat"]
    tallies = cost.evaluate("fitted", cost.fitted, others, runs=50 if quick else 500)
    # Of 100 runs, a share of 5% is known to some 4 percentage points only.
    flat = cost.evaluate("fitted", cost.fitted, ["flat"], runs=10 if quick else 400)["flat"]
    covered, known, phases = (
        sum(getattr(t, what) for t in tallies.values()) for what in ("covered", "known", "phases")
    )
    yield Figure(
        "planted costs inside the 95% interval",
        "90 to 98%",
        f"{covered / known:.1%} of {known}; {phases - known} of {phases} were not identifiable",
        ", ".join(f"{kind} {t.covered / t.known:.1%}" for kind, t in tallies.items()),
        0.90 <= covered / known <= 0.98,
    )
    yield Figure(
        "a cost measured where there is none",
        "≤ 5% of runs",
        f"{flat.measured / flat.phases:.1%} ({flat.measured} of {flat.phases})",
        "",
        flat.measured / flat.phases <= 0.05,
    )


SUITE, SUITE_GOAL = "the whole test suite, with installs", "≤ 8 min on two cores"


def suite(_quick: bool) -> Iterator[Figure]:
    start = time.perf_counter()
    failed = subprocess.run(["sh", ".ci/run"], stdin=subprocess.DEVNULL, check=False).returncode
    minutes = (time.perf_counter() - start) / 60
    verdict = "all pass" if not failed else "some FAIL"
    yield Figure(SUITE, SUITE_GOAL, f"{minutes:.1f} min, {verdict}", "", not failed and minutes <= 8)


GROUPS: dict[str, Callable[[bool], Iterator[Figure]]] = {
    "record-cuda": record_cuda,
    "record-cpu": record_cpu,
    "loop": loop,
    "engine": engine,
    "sustained": sustained,
    "size": size,
    "reading": reading,
    "workers": workers,
    "incidents": planted_incidents,
    "cost": planted_costs,
    "suite": suite,
}


def measured(name: str, quick: bool) -> list[Figure]:
    """A group of rows, in a process of its own: what one imports would count as another's memory."""
    with contextlib.redirect_stdout(sys.stderr):
        found = list(GROUPS[name](quick))
    return [replace(figure, met=None) for figure in found] if quick else found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    groups = [name for name in GROUPS if name != "suite"]
    parser.add_argument("--only", nargs="+", choices=groups, default=groups, metavar="NAME")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--suite", action="store_true")
    args = parser.parse_args()
    described = machine()
    figures: list[Figure] = []
    for name in [*args.only, *(["suite"] if args.suite else [])]:
        known = len(figures)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own:
            try:
                figures += own.submit(measured, name, args.quick).result()
            except Exception as error:  # the other rows took minutes, too
                traceback.print_exc()
                reason = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                figures.append(Figure(name, "", reason.rstrip(": "), "", met=False))
        # All of it takes long: what is known so far must not be lost if it is ended.
        print(table(figures[known:]), file=sys.stderr, flush=True)
    if not args.suite and args.only == groups:
        figures.append(Figure(SUITE, SUITE_GOAL, "not measured: `--suite` runs it", "", None))
    print(described, table(figures), sep="\n\n")


if __name__ == "__main__":
    main()
