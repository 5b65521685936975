"""`prune --merge-ranks` on made-up runs, live, broken and refused, against what its documentation says.

The oracle of :mod:`test_retained_runs` knows the limits. Here it also knows which runs are merged, and when;
what a run is once it is merged, it gets from `compact`.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from aged_runs import DAY, aged_session, begin_journal, set_back
from test_retained_runs import (
    HOUR,
    Oracle,
    Planted,
    assert_files,
    manifest_of,
    prune,
    segments_of,
    state_of,
    tiers_of,
)
from thinning import info_of

from eplb_analyze.cli.commands import prune as command
from eplb_analyze.transfer.compact import compact_run
from eplb_dump.format.journal import lock
from eplb_dump.format.schema import Scope

STEPS = 32
QUARTER = HOUR // 4
KINDS = [
    "ranks", "plain", "ranks", "rearranged", "crashed", "journals", "one-rank", "foreign", "live", "missing",
    "ranks", "plain",
]  # fmt: skip
#: The writers of these runs have ended, and `compact` takes them.
MERGED = ("ranks", "rearranged", "crashed", "journals")
#: What differs between two merges of one run, as their ids do, changes no decision if it is fewer bytes.
CHANCE_BYTES = 1000


def plant(dump: Path, number: int, now: int, chance: random.Random, most: int) -> Planted:
    """A run of at most so many segments, each of another quarter of an hour: a merged one is one of them."""
    kind = KINDS[number % len(KINDS)]
    run = Planted(f"{kind}-{number:02}", closed=kind not in ("crashed", "live", "journals"))
    age = chance.choice([4, 8, 20, 30, 60, 100, 300, 1000]) * HOUR
    age += 2 * DAY if kind in ("crashed", "journals") else 0
    last = [(now - age) // QUARTER * QUARTER + QUARTER // 5]
    for _ in range(chance.randint(1, most) - 1):
        last.insert(0, last[0] - chance.choice([1, 5, 90]) * QUARTER)
    if kind == "rearranged":
        run.rearranged = {len(last) // 2} - {0}
    for rank in range(1 if kind in ("plain", "one-rank") else 8):
        run.ends.append(last)
        run.folders.append(
            aged_session(
                dump, run.run_id, last, rank=rank, scope=Scope.GLOBAL if kind == "plain" else Scope.LOCAL,
                closed=run.closed, rearranged=sorted(run.rearranged), steps=STEPS,
            )
        )  # fmt: skip
    if kind in ("live", "journals"):
        run.journal_ns = last[-1] + HOUR // 60
        run.live, run.stuck = kind == "live", kind == "journals"
        for folder in run.folders:
            begin_journal(folder, info_of(folder), len(last), run.journal_ns, STEPS).close()
            set_back(folder, run.journal_ns)
    elif kind == "foreign":
        (run.folders[0].parent / "notes.txt").write_text("mine")
        run.never = True
    elif kind == "missing":
        (run.folders[3] / f"loads-{len(last) - 1:06}.parquet").unlink()
        run.missing, run.stuck = {(3, len(last) - 1)}, True
    return run


def merge_of(run: Planted, dump: Path, to: Path) -> Planted:
    """The run once its ranks are merged."""
    compact_run(dump, to, run.run_id, run_id=run.run_id)
    (folder,) = (to / f"run={run.run_id}").glob("*/*/session=*")
    merged = Planted(run.run_id, [folder], [[]], closed=run.closed)
    for entry in manifest_of(folder).entries.values():
        assert entry.times is not None
        merged.ends[0].append(entry.times[1])
        begun = {seq * STEPS for seq in run.rearranged}
        if begun & {*range(entry.first_step, entry.last_step + 1)}:
            merged.rearranged.add(entry.seq)
    return merged


class MergingOracle(Oracle):
    """What the limits keep if ranks are merged: ``merged`` has those runs that `compact` takes, by id."""

    def __init__(self, runs: list[Planted], now: int, merged: dict[str, Planted]) -> None:
        super().__init__(runs, now)
        self.merged = merged

    def merge(self, run: Planted) -> None:
        if run.run_id in self.merged and run is not self.merged[run.run_id]:
            merged = self.merged[run.run_id]
            del self.runs[run], self.size[run]
            self.runs[merged] = segments_of(merged)
            self.size[merged] = sum(path.stat().st_size for path in merged.folders[0].iterdir())

    def ages(self, full: int, ranks: int, minutes: int) -> None:
        # "A run of which something is older than a limit is merged first", if it is not removed.
        for run, segments in [*self.runs.items()]:
            if self.now - run.newest <= minutes and any(self.now - s.end > full for s in segments):
                self.merge(run)
        super().ages(full, ranks, minutes)

    def bytes(self, most: int) -> None:
        # "Before anything is thinned, runs are merged, the oldest first, until the dump fits."
        for run in sorted(self.runs, key=lambda run: (run.newest, run.run_id)):
            if sum(self.size[run] for run in self.runs) > most:
                self.merge(run)
        self.size = {run: self.size[run] for run in self.runs}
        super().bytes(most)

    def kept(self) -> dict[str, tuple[bool, dict[tuple[int, int], str]]]:
        """By run: whether it is merged, and the tier of each segment."""
        return {
            run.run_id: (
                self.merged.get(run.run_id) is run,
                {(segment.session, segment.seq): segment.tier for segment in segments},
            )
            for run, segments in self.runs.items()
        }


def kept_in(dump: Path, runs: list[Planted]) -> dict[str, tuple[bool, dict[tuple[int, int], str]]]:
    """The same of a dump."""
    found = {}
    for run in runs:
        top = dump / f"run={run.run_id}"
        if top.exists():
            folders = sorted(top.glob("*/*/session=*"))
            tiers = {(n, seq): tier for n, f in enumerate(folders) for seq, tier in tiers_of(f).items()}
            found[run.run_id] = len(folders) < len(run.folders), tiers
            for folder in folders:
                assert_files(folder, run)
    return found


@contextmanager
def copy_of(start: Path, dump: Path) -> Iterator[None]:
    """A copy of the runs, whose live writers hold their locks."""
    shutil.copytree(start, dump)
    with ExitStack() as held:
        for journal in dump.glob("run=live*/*/*/*/journal-*"):
            assert lock(held.enter_context(journal.open("r+b")).fileno())
        yield
    shutil.rmtree(dump)


def decisions(document: dict[str, Any]) -> list[Any]:
    """What a report says is done, but for bytes of which a dry run knows less."""
    return [
        (
            run["run_id"], run["action"], run["reason"], run["merged_bytes"] is None, run["not_merged"],
            [{**move, "freed_bytes": 0} for move in run["moves"]], [part["reason"] for part in run["kept"]],
        )
        for run in document["runs"]
    ]  # fmt: skip


def prune_twice(dump: Path, limits: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The reports of a dry run and of the run; a second run does nothing."""
    before = state_of(dump)
    dry = prune(dump, "--merge-ranks", "--dry-run", *limits)
    assert state_of(dump) == before
    real = prune(dump, "--merge-ranks", *limits)
    after = state_of(dump)
    again = prune(dump, "--merge-ranks", *limits)
    assert state_of(dump) == after
    assert again["bytes_after"] == real["bytes_after"]
    return dry, real


@pytest.mark.usefixtures("swaps")
@pytest.mark.parametrize("seed", range(2))
def test_merged_runs_are_kept_as_the_documentation_says(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "LEAST_BYTES", 1)
    now = time.time_ns()
    chance = random.Random(seed)
    start, dump = tmp_path / "start", tmp_path / "dump"
    # A dry run merges three segments of a run to know their sizes: of short runs it knows all.
    runs = [plant(start, number, now, chance, most=3) for number in range(len(KINDS))]
    merged = {
        run.run_id: merge_of(run, start, tmp_path / "merged") for run in runs if run.run_id.startswith(MERGED)
    }
    for full, ranks, minutes in ((36 * HOUR, 7 * DAY, 30 * DAY), (5 * HOUR, 10 * HOUR, 5 * DAY)):
        oracle = MergingOracle(runs, now, merged)
        oracle.ages(full, ranks, minutes)
        limits = ["--keep-full", f"{full // HOUR}h", "--keep-ranks", f"{ranks // HOUR}h"]
        with copy_of(start, dump):
            dry, real = prune_twice(dump, [*limits, "--keep-minutes", f"{minutes // HOUR}h"])
            assert decisions(dry) == decisions(real)
            assert kept_in(dump, runs) == oracle.kept()
    seen: Counter[tuple[str, bool]] = Counter()
    oracle = MergingOracle(runs, now, merged)
    total = sum(oracle.size.values())
    for run in runs:
        oracle.merge(run)
    least = sum(oracle.size.values())
    for limit in (0.8 * total, 0.5 * total, 0.9 * least, 0.6 * least, 0.3 * least, 0.1 * least):

        def kept(most: int) -> Any:
            oracle = MergingOracle(runs, now, merged)
            oracle.bytes(most)
            return oracle.kept()

        most = int(limit)
        while kept(most - CHANCE_BYTES) != kept(most + CHANCE_BYTES):
            most += CHANCE_BYTES
        with copy_of(start, dump):
            dry, real = prune_twice(dump, ["--max-bytes", str(most)])
            assert decisions(dry) == decisions(real)
            assert kept_in(dump, runs) == kept(most)
        seen.update((run["action"], run["merged_bytes"] is not None) for run in real["runs"])
    assert min(seen["merged", True], seen["thinned", True], seen["removed", True]) > 0
