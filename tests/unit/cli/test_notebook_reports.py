"""Reports in a notebook: what the command prints, as HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cli

import eplb_analyze
from eplb_analyze import Run, open_run
from eplb_analyze.cli.notebook import VIEWS, WIDTH
from eplb_dump import ExpertLoadWriter

STEPS, LAYERS, EXPERTS, RANKS = 300, 2, 8, 4


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of scope local whose placement changes in its middle; its model has a hostile name."""
    folder = tmp_path_factory.mktemp("notebook") / "dump"
    rng = np.random.default_rng(5)
    placement = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    writers = [
        ExpertLoadWriter(
            folder, model="<script>alert(1)</script>", num_logical_experts=EXPERTS, ep_size=RANKS,
            ep_rank=rank, scope="local", run_id="r", ranks_per_node=2,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    for step in range(STEPS):
        if step == STEPS // 2:
            placement = placement[:, ::-1].copy()
        share = 1.0 + 3 * (placement[0] == 3)
        for writer in writers:
            load = rng.multinomial(200, share / share.sum(), size=LAYERS)
            writer.record(step, load, placement, step_ms=10.0)
        if step % 50 == 49:
            assert all(writer.flush(60) for writer in writers)
    assert all(writer.close(60) for writer in writers)
    return folder


#: By the class of the report: the command that prints it, and the function that makes it.
REPORTS: dict[str, tuple[tuple[str, ...], Callable[[Run], Any]]] = {
    "Summary": (("summary",), eplb_analyze.summarize),
    "LayerReport": (("layer", "1"), lambda run: eplb_analyze.layer_report(run, 1)),
    "ExpertReport": (("experts",), eplb_analyze.expert_report),
    "RankReport": (("ranks",), eplb_analyze.rank_report),
    "Timeline": (("timeline", "--bins", "100"), eplb_analyze.timeline),
    "PlacementReport": (("placement",), eplb_analyze.placement_report),
    "TrafficReport": (("traffic",), eplb_analyze.traffic_report),
    "RearrangementReport": (("rearrangements",), eplb_analyze.rearrangement_report),
    "CheckReport": (("check",), eplb_analyze.check_run),
    "Replay": (
        ("replay", "--policy", "deepseek", "--interval-steps", "50", "--window-steps", "50"),
        lambda run: eplb_analyze.replay_run(
            run, eplb_analyze.Choices(policies=["deepseek"], intervals=[50], windows=[50])
        ),
    ),
    "Advice": (("advise",), eplb_analyze.advise),
}


def text_of(page: str) -> list[str]:
    """The lines that a reader of the page sees, without blanks at their ends."""
    text = html.unescape(re.sub("<[^>]*>", "", page))
    return [line.rstrip() for line in text.rstrip().splitlines()]


def test_every_view_is_tried() -> None:
    assert REPORTS.keys() == VIEWS.keys()


@pytest.mark.parametrize("kind", REPORTS)
def test_a_notebook_shows_what_the_command_prints(dump: Path, kind: str) -> None:
    command, analysis = REPORTS[kind]
    result = cli(*command, dump, env={"COLUMNS": str(WIDTH)})
    assert result.returncode == 0, result.stderr
    printed = result.stdout
    report = analysis(open_run(dump))
    assert type(report).__name__ == kind
    page = report._repr_html_()
    lines = text_of(page)
    assert [line for line in lines if line] == [line for line in printed.splitlines() if line.strip()]
    assert "<script" not in page
    assert page.startswith('<pre style="font-family:')
    assert ",monospace;" in page  # columns line up in any page
    assert any("<script>alert(1)</script>" in line for line in lines) or kind in ("CheckReport",)


def test_a_report_without_a_view_is_shown_by_its_repr(dump: Path) -> None:
    run = open_run(dump)
    halves = eplb_analyze.compare_runs(run, run, steps_a=(0, 150), steps_b=(150, 300))
    assert halves._repr_html_() is None


def test_a_timeline_of_many_bins_is_not_cut(dump: Path) -> None:
    lines = text_of(eplb_analyze.timeline(open_run(dump), bins=STEPS)._repr_html_())
    axis = next(line for line in lines if "└" in line)
    assert len(axis) - axis.index("└") - 1 == STEPS
