"""How many planted incidents `summary` finds, and how often it reports one in a run without.

    python -m benchmarks.incidents [--runs 400] [--clean 400] [--first-seed 100000] [--verbose]

A planted incident counts if its mean effect on its layer's balancedness is above 0.05 and above twice the
standard deviation of single steps. It is right if both edges are within 2 steps and layer, rank, expert and
cause are right. Runs have 300 to 20,000 steps, 4 to 64 EP ranks and a drifting background, and one to three
incidents of 10 to 5,000 steps. Thresholds were chosen on other seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from eplb_analyze.analysis.incident_finder import find_incidents

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))

from planted_incidents import CAUSES, make_run


def causes_of(seed: int) -> tuple[str, ...]:
    """One to three causes; each kind comes first equally often."""
    rng = np.random.default_rng(seed)
    first = CAUSES[seed % len(CAUSES)]
    if first == "eplb_stopped":  # it needs the whole run to act and to stop
        return (first,)
    others = [cause for cause in CAUSES if cause != "eplb_stopped"]
    return (first, *map(str, rng.choice(others, int(rng.choice([0, 0, 1, 2])))))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--clean", type=int, default=400)
    parser.add_argument("--first-seed", type=int, default=100_000)
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    planted: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    right: Counter[str] = Counter()
    faults: Counter[Any] = Counter()
    others = 0
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.runs):
        run = make_run(seed, causes_of(seed))
        found = find_incidents(run.series(), run).found
        layers = len(run.layers)
        others += sum(all(len(truth.wrong(one, layers)) > 2 for truth in run.truths) for one in found)
        for truth in run.truths:
            planted[truth.kind] += 1
            if not truth.counts:
                continue
            counted[truth.kind] += 1
            wrong = min((truth.wrong(one, layers) for one in found), key=len, default=["missed"])
            right[truth.kind] += not wrong
            if wrong:
                faults[truth.kind, tuple(wrong) if len(wrong) < 3 else ("missed",)] += 1
                if arguments.verbose:
                    print(seed, run.load.shape, truth, wrong, *found, sep="\n  ")
    if arguments.runs:
        print("| cause | planted | large enough | right |\n| --- | --- | --- | --- |")
        for kind in CAUSES:
            share = right[kind] / max(1, counted[kind])
            print(f"| `{kind}` | {planted[kind]} | {counted[kind]} | {right[kind]} ({share:.1%}) |")
        share = right.total() / max(1, counted.total())
        print(f"| all | {planted.total()} | {counted.total()} | {right.total()} ({share:.1%}) |")
        print("wrong:", ", ".join(f"{kind} {'+'.join(what)} {n}" for (kind, what), n in faults.most_common()))
        print(f"reported besides: {others} in {arguments.runs} runs")
    alarms = 0
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.clean):
        run = make_run(seed + 1_000_000)
        found = find_incidents(run.series(), run).found
        alarms += bool(found)
        if found and arguments.verbose:
            print("false alarm", seed, run.load.shape, *found, sep="\n  ")
    if arguments.clean:
        print(f"clean runs with an incident: {alarms} of {arguments.clean} ({alarms / arguments.clean:.1%})")


if __name__ == "__main__":
    main()
