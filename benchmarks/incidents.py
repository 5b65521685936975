"""How many planted incidents `summary` finds, and how often it reports one in a run without.

    python -m benchmarks.incidents [--runs 400] [--clean 400] [--recordings 40] [--by-rank 400]
                                   [--first-seed 100000]

A planted incident counts if its mean effect on its layer's balancedness is above 0.05 and above twice the
standard deviation of single steps. The effect is by comparison with the same steps without the incident.
It is right if both edges are within 2 steps and layer, rank, expert and cause are right. Runs have 300 to
20,000 steps, 4 to 64 EP ranks and a drifting background, and one to three incidents of 10 to 5,000 steps.
Thresholds were chosen on other seeds.

`--runs` and `--clean` give the finder the sums of generated loads. `--recordings` of each kind (at most an
eighth as many layers) are written by the writer with planted clock times, by all ranks if there are up to 8
and by one otherwise, and `eplb-analyze summary --json` reads them. The goals are 95% right and at most 2% of
the clean runs with an incident.

`--by-rank` compares the incidents that tokens per EP rank show with those of the same runs with experts'
loads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eplb_analyze.analysis.incident_finder import find_incidents
from eplb_analyze.analysis.incidents import Incident

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))

from planted_incidents import CAUSES, CELLS, PlantedRun, Truth, make_run
from recorded_incidents import incidents_of, record

#: Thresholds were chosen on other seeds.
FIRST_SEED = 100_000


def causes_of(seed: int) -> tuple[str, ...]:
    """One to three causes; each kind comes first equally often."""
    rng = np.random.default_rng(seed)
    first = CAUSES[seed % len(CAUSES)]
    if first == "eplb_stopped":  # it needs the whole run to act and to stop
        return (first,)
    others = [cause for cause in CAUSES if cause != "eplb_stopped"]
    return (first, *map(str, rng.choice(others, int(rng.choice([0, 0, 1, 2])))))


def by_sums(run: PlantedRun, seed: int) -> list[Incident]:
    return find_incidents(run.series(), run).found


def by_recording(run: PlantedRun, seed: int) -> list[Incident]:
    """What `summary --json` prints of the run's recording; its clock times are checked."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        times = record(run, Path(folder), patch, local=run.ranks <= 8, seed=seed)
        patch.undo()
        command = [sys.executable, "-m", "eplb_analyze", "summary", "--json", folder]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return incidents_of(json.loads(text), times)


class Tally:
    """What was found in the runs of one kind."""

    def __init__(self) -> None:
        self.planted: Counter[str] = Counter()
        self.counted: Counter[str] = Counter()
        self.right: Counter[str] = Counter()
        self.faults: Counter[Any] = Counter()
        self.runs = self.others = 0

    def add(self, run: PlantedRun, found: list[Incident]) -> list[tuple[Truth, list[str]]]:
        """Judge a run; the incidents that were not found as they are."""
        layers, wrongs = len(run.layers), []
        self.runs += 1
        self.others += sum(all(len(truth.wrong(one, layers)) > 2 for truth in run.truths) for one in found)
        for truth in run.truths:
            self.planted[truth.kind] += 1
            if not truth.counts:
                continue
            self.counted[truth.kind] += 1
            wrong = min((truth.wrong(one, layers) for one in found), key=len, default=["missed"])
            self.right[truth.kind] += not wrong
            if wrong:
                self.faults[truth.kind, tuple(wrong) if len(wrong) < 3 else ("missed",)] += 1
                wrongs.append((truth, wrong))
        return wrongs

    def __str__(self) -> str:
        rows = ["| cause | planted | large enough | right |", "| --- | --- | --- | --- |"]
        for kind in CAUSES:
            share = self.right[kind] / max(1, self.counted[kind])
            right = f"{self.right[kind]} ({share:.1%})"
            rows.append(f"| `{kind}` | {self.planted[kind]} | {self.counted[kind]} | {right} |")
        share = self.right.total() / max(1, self.counted.total())
        right = f"{self.right.total()} ({share:.1%})"
        rows.append(f"| all | {self.planted.total()} | {self.counted.total()} | {right} |")
        wrong = [f"{kind} {'+'.join(what)} {n}" for (kind, what), n in self.faults.most_common()]
        rows.append(f"wrong: {', '.join(wrong) or 'none'}")
        rows.append(f"reported besides: {self.others} in {self.runs} runs")
        return "\n".join(rows)


def evaluate(
    find: Callable[[PlantedRun, int], list[Incident]],
    runs: int,
    clean: int,
    cells: int,
    first: int = FIRST_SEED,
    verbose: bool = False,
) -> tuple[Tally, int]:
    """What was found of the planted incidents, and how many clean runs have an incident."""
    tally, alarms = Tally(), 0
    for seed in range(first, first + runs):
        run = make_run(seed, causes_of(seed), cells=cells)
        found = find(run, seed)
        for truth, wrong in tally.add(run, found):
            if verbose:
                print(seed, run.load.shape, truth, wrong, *found, sep="\n  ")
    if runs:
        print(tally, flush=True)
    for seed in range(first, first + clean):
        run = make_run(seed + 1_000_000, cells=cells)
        found = find(run, seed)
        alarms += bool(found)
        if found and verbose:
            print("false alarm", seed, run.load.shape, *found, sep="\n  ")
    if clean:
        print(f"clean runs with an incident: {alarms} of {clean} ({alarms / clean:.1%})", flush=True)
    return tally, alarms


def compare_by_rank(first: int, runs: int, *, verbose: bool) -> None:
    """How many incidents are the same if experts' loads are not kept."""
    count: Counter[str] = Counter()
    for seed in range(first, first + runs):
        run = make_run(seed, causes_of(seed))
        full, by_rank = (
            {(i.first_step, i.last_step, i.layers, i.ranks) for i in by_sums(one, seed)}
            for one in (run, replace(run, by_rank=True))
        )
        count.update(full=len(full), same=len(full & by_rank), other=len(by_rank - full))
        if verbose and full != by_rank:
            print(seed, run.load.shape, *run.truths, full - by_rank, by_rank - full, sep="\n  ")
    print(
        f"by tokens per rank: {count['same']} of {count['full']} incidents have the same steps, layers and "
        f"ranks; {count['other']} others"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--clean", type=int, default=400)
    parser.add_argument("--recordings", type=int, default=0)
    parser.add_argument("--by-rank", type=int, default=0)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    how = arguments.first_seed, arguments.verbose
    evaluate(by_sums, arguments.runs, arguments.clean, CELLS, *how)
    if arguments.by_rank:
        compare_by_rank(arguments.first_seed, arguments.by_rank, verbose=arguments.verbose)
    if arguments.recordings:
        print("recordings:")
        evaluate(by_recording, arguments.recordings, arguments.recordings, CELLS // 8, *how)


if __name__ == "__main__":
    main()
