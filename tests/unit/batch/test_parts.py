"""A long run that is read in parts has the row and the summary that it has when it is read as a whole."""

from __future__ import annotations

import json
import pickle
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clocks import steady_clock
from helpers import assert_close
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from eplb_analyze import open_run
from eplb_analyze.analysis.rearrangements import rearrangement_report
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.batch import postmortem
from eplb_analyze.batch.cache import ResultCache
from eplb_analyze.batch.executors import Local
from eplb_analyze.batch.targets import find
from eplb_analyze.json_report import versioned, with_times
from eplb_analyze.reader import run as reader
from eplb_analyze.reader.placements import PlacementHistory
from eplb_analyze.sessions.step_range import StepRange
from eplb_dump import ExpertLoadWriter

STEPS, SEGMENT, LAYERS, EXPERTS, SLOTS, EP_SIZE = 240, 16, 3, 6, 8, 4


@dataclass(frozen=True)
class Story:
    """A run: its placement changes, steps that a rank misses, and steps at which a rank's writer restarts."""

    local: bool
    #: Steps at which layers change.
    changes: list[tuple[int, set[int]]]
    missed: list[tuple[int, int]]
    restarts: list[tuple[int, int]]

    @property
    def ranks(self) -> int:
        return EP_SIZE if self.local else 1

    def write(self, root: Path) -> None:
        rng = np.random.default_rng(3)
        placement = np.tile(np.arange(SLOTS) % EXPERTS, (LAYERS, 1))

        def opened(rank: int) -> ExpertLoadWriter:
            return ExpertLoadWriter(
                root, model="m", run_id="r", num_logical_experts=EXPERTS, ep_size=EP_SIZE, ep_rank=rank,
                scope="local" if self.local else "global", segment_steps=SEGMENT,
            )  # fmt: skip

        with steady_clock(20):
            writers = [opened(rank) for rank in range(self.ranks)]
            for step in range(STEPS):
                for at, layers in self.changes:
                    if at == step:
                        placement = placement.copy()
                        for layer in layers:
                            placement[layer] = rng.permutation(placement[layer])
                load = rng.multinomial(300, rng.dirichlet(np.full(SLOTS, 4)), size=(self.ranks, LAYERS))
                for rank, own in enumerate(load):
                    if (step, rank) in self.restarts:
                        assert writers[rank].close(60)
                        writers[rank] = opened(rank)
                    if (step, rank) not in self.missed:
                        writers[rank].record(step, own, placement, num_tokens=300)
                    assert step % 40 < 39 or writers[rank].flush(60)
            for writer in writers:
                assert writer.close(60)


class Apart(Local):
    """As other processes do it: each task by a worker that knows of no other."""

    def map(self, work: Any, items: Any) -> Iterator[Any]:
        for item in items:
            postmortem._opened.cache_clear()
            yield item, sent(work(sent(item)))


def sent(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301 - what this process made


STEP = st.integers(0, STEPS - 1)
STORIES = st.builds(
    Story,
    st.booleans(),
    st.lists(st.tuples(STEP, st.sets(st.integers(0, LAYERS - 1), min_size=1)), max_size=12),
    st.lists(st.tuples(STEP, st.integers(0, EP_SIZE - 1)), max_size=4),
    st.lists(st.tuples(STEP, st.integers(0, EP_SIZE - 1)), max_size=2),
)


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(STORIES, st.integers(1, STEPS // 2))
@example(Story(False, [(step, {0, 1, 2}) for step in range(20, STEPS, 20)], [], []), 50)
@example(Story(True, [(100, {0}), (103, {1}), (180, {0, 2})], [(100, 1), (180, 2)], []), 30)
@example(Story(True, [(40, {0, 1}), (120, {2})], [], [(80, 2)]), 30)
@example(Story(False, [(40, {0, 1}), (120, {2}), (130, {0})], [], [(60, 0), (121, 0)]), 40)
def test_parts_and_whole_agree_for_every_cut(story: Story, part_steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as cleanup:
        patch = cleanup.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(postmortem, "JUDGED_AT_ONCE", 2)
        root = Path(folder)
        story.write(root / "dump")
        shutil.copytree(root / "dump", root / "copy")
        found = {}
        for about in (part_steps, STEPS + 1):
            patch.setattr(reader, "PART_STEPS", about)
            run = open_run(root / "dump")
            for steps in run.parts():
                assert_same_placements(run.placed_in(steps).history, run.history, steps)
            whole = with_times(summarize(run).to_json(), run.clock.iso)
            cache = ResultCache(root / f"saved-{about}")
            # Of a single long run, the row is made by this process, and of several by workers.
            others = [] if about > STEPS else [str(root / "copy")]
            (row, _), *more = postmortem.rows_of(find([str(root / "dump"), *others]), Apart(), cache)
            assert [replace(other, dump=row.dump) for other, _ in more] == [row] * len(others)
            stored = json.loads(cache.report_path(row, "json").read_text())
            # To the last bit: the parts and the order of merging are the same.
            assert stored == versioned(json.loads(json.dumps(whole)))
            verdicts = Counter(one.verdict for one in rearrangement_report(run).rearrangements)
            assert row.rearrangements == verdicts.total()
            assert [row.helped, row.helped_at_first, row.hurt, row.no_op] == [
                verdicts[name] for name in ("helped", "helped at first", "hurt", "no-op")
            ]
            found[about] = json.loads(json.dumps([asdict(row), stored]))
        assert_close(found[part_steps], found[STEPS + 1], 1e-6)


def assert_same_placements(found: PlacementHistory, expected: PlacementHistory, steps: StepRange) -> None:
    own, other = found.within(steps), expected.within(steps)
    assert own is not None
    assert other is not None
    assert [column.tolist() for column in own] == [column.tolist() for column in other]
    for layer in range(LAYERS):
        in_force = [history.layer(layer).index_at(steps.first) for history in (found, expected)]
        assert (in_force[0] < 0) == (in_force[1] < 0)
        for name in ("steps", "ep_sizes", "slots") if in_force[0] >= 0 else ():
            one, two = (
                getattr(history.layer(layer), name)[at]
                for history, at in zip((found, expected), in_force, strict=True)
            )
            assert np.array_equal(one, two)


def test_part_reads_no_placements_that_are_not_in_force_in_it(tmp_path: Path) -> None:
    story = Story(True, [(step, set(range(LAYERS))) for step in range(20, STEPS, 20)], [], [])
    story.write(tmp_path)
    steps, expected = StepRange(160, 176), open_run(tmp_path).history
    for path in tmp_path.rglob("placements-*.parquet"):
        if not 6 <= int(path.stem.split("-")[1]) <= 10:  # those of changes at steps 100 to 160
            path.unlink()
    part = open_run(tmp_path).placed_in(steps)
    assert_same_placements(part.history, expected, steps)
    assert not part.findings
