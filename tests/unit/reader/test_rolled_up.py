"""Sums per minute of ranks that begin and end at different steps, and idle: they count the same steps."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from clocks import START_NS, steady_clock
from helpers import open_writer
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from thinning import session_folders, thin_to

from eplb_analyze import open_run
from eplb_analyze.analysis.findings import summary_findings
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.reader.join import StepState
from eplb_dump.format.schema import Tier

RANKS, SLOTS, LOGICAL, SEGMENT, STEPS, STEP_MS = 3, 6, 4, 32, 180, 1000
EDGES = st.tuples(st.integers(0, 40), st.integers(120, STEPS))
IDLE = st.tuples(st.integers(20, 150), st.integers(0, 100))


@example(edges=[(0, 180), (0, 178), (0, 176)], idle=[(200, 0)] * 3, change=70, named=True, by_rank=False)
@example(
    edges=[(0, 180)] * 3,
    idle=[(200, 0), (60, 30), (60, 30)],
    change=70,
    named=False,
    by_rank=True,
)
@example(
    edges=[(0, 120), (0, 120), (0, 129)],
    idle=[(20, 0), (20, 0), (20, 44)],  # a whole segment
    change=1,
    named=False,
    by_rank=True,
)
@given(
    edges=st.lists(EDGES, min_size=RANKS, max_size=RANKS),
    idle=st.lists(IDLE, min_size=RANKS, max_size=RANKS),
    change=st.integers(1, STEPS),
    named=st.booleans(),
    by_rank=st.booleans(),
)
# Each example takes half a second; a failure is plain without being made smaller.
@settings(max_examples=15, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_steps_are_complete_or_not_as_their_rows_say(
    edges: list[tuple[int, int]], idle: list[tuple[int, int]], change: int, *, named: bool, by_rank: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for rank, ((first, end), (begins, lasts)) in enumerate(zip(edges, idle, strict=True)):
            with (
                steady_clock(STEP_MS, START_NS + first * STEP_MS * 10**6),
                open_writer(
                    root, ep_size=RANKS, ep_rank=rank, num_logical_experts=LOGICAL, segment_steps=SEGMENT
                ) as writer,
            ):
                for step in range(first, end):
                    # Rank 0 always has tokens, and so is told of each placement.
                    if rank and begins <= step < begins + lasts:
                        writer.skip("dummy", step)
                        continue
                    placement = (np.arange(SLOTS) + (step >= change)) % LOGICAL
                    phase = ("prefill" if step % 7 == 0 else "decode") if named else None
                    writer.record(step, np.full((1, SLOTS), step), placement[np.newaxis], phase=phase)
                assert writer.flush(60)
            if by_rank:
                for folder in session_folders(root)[rank:]:
                    segments = len([*folder.glob("steps-*.parquet")])
                    thin_to(folder, {Tier.RANKS: range(segments - 1)})
        exact, found = (summarize(open_run(root), tier=tier) for tier in ("steps", "minutes"))
        assert found.tier == "minutes"
        for summary in (exact, found):
            states = {state: summary.steps.count(state) for state in StepState}
            common = max(0, min(end for _, end in edges) - max(first for first, _ in edges))
            assert states[StepState.RECORDED] + states[StepState.DUMMY] == common
            assert sum(states.values()) == max(end for _, end in edges) - min(first for first, _ in edges)
        severe = [
            {f.code for f in summary_findings(open_run(root), summary.steps) if f.severity == "error"}
            for summary in (exact, found)
        ]
        assert severe[0] == severe[1]
