"""Sessions of which some segments were thinned: what is opened, and what is ignored."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import LAYERS, load_of, map_of, open_writer
from thinning import info_of, thin_to

from eplb_analyze import open_run
from eplb_analyze.analysis.experts import expert_report
from eplb_analyze.errors import Finding
from eplb_analyze.reader.run import Run
from eplb_analyze.sessions.discovery import Session, open_session, refresh_thinned
from eplb_analyze.sessions.parquet_segment import ParquetSegment
from eplb_analyze.sessions.segments import DamagedSegmentError
from eplb_analyze.transfer.recover import recover_dump
from eplb_dump.format import segment
from eplb_dump.format.files import remove
from eplb_dump.format.schema import MANIFEST_FILE, Tier, journal_name

SEGMENTS, STEPS = 8, 4
TIERS = {Tier.RANKS: [4, 5], Tier.MINUTES: [2, 3], Tier.GONE: [0, 1]}


@pytest.fixture(scope="module")
def journals() -> dict[str, bytes]:
    """The journals that were sealed, by name."""
    return {}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, journals: dict[str, bytes]) -> Iterator[Path]:
    """A session of eight segments; the placement changes in the third."""
    root = tmp_path_factory.mktemp("recorded")

    def keep(*paths: Path) -> None:
        journals.update((path.name, path.read_bytes()) for path in paths)
        remove(*paths)

    with (
        pytest.MonkeyPatch.context() as patch,
        open_writer(root, scope="global", segment_steps=STEPS) as writer,
    ):
        patch.setattr(segment, "remove", keep)
        for step in range(SEGMENTS * STEPS):
            writer.record(step, load_of(step), map_of(step // 9), phase="decode")
        assert writer.close(60)
        yield root


@pytest.fixture
def root(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "dump"))


def folder_of(root: Path) -> Path:
    return next(root.rglob(MANIFEST_FILE)).parent


def opened(root: Path) -> tuple[Session, list[Finding]]:
    findings: list[Finding] = []
    folder = folder_of(root)
    return open_session(folder, info_of(folder), findings, None), findings


@pytest.mark.parametrize("merged", [False, True])
def test_retired_segments_are_apart_from_those_with_steps(root: Path, merged: bool) -> None:
    thin_to(folder_of(root), TIERS, merged=merged)
    session, findings = opened(root)
    assert findings == []
    assert [(s.seq, s.has_loads) for s in session.segments] == [(4, False), (5, False), (6, True), (7, True)]
    assert [(e.seq, e.last_seq, e.tier) for e in session.thinned] == (
        [(0, 1, Tier.GONE), (2, 3, Tier.MINUTES)]
        if merged
        else [(0, 0, Tier.GONE), (1, 1, Tier.GONE), (2, 2, Tier.MINUTES), (3, 3, Tier.MINUTES)]
    )
    rolled = [
        rows for segment in session.retired if segment.has_minutes for rows in segment.minutes(["recorded"])
    ]
    assert sum(int(rows["recorded"].sum()) for rows in rolled) == 2 * STEPS


def test_sums_per_rank_are_those_of_the_loads(root: Path) -> None:
    before = {s.seq: s for s in opened(root)[0].segments}[4]
    expected = np.concatenate([load for _, load in before.rank_loads(0, LAYERS)])
    steps = before.load_steps()
    thin_to(folder_of(root), TIERS)
    segment = opened(root)[0].segments[0]
    assert segment.load_steps().tolist() == steps.tolist() == [16, 17, 18, 19]
    assert np.array_equal(np.concatenate([load for _, load in segment.rank_loads(0, LAYERS)]), expected)
    assert (segment.recorded, segment.step_rows) == (STEPS, STEPS)
    with pytest.raises(DamagedSegmentError, match="no longer kept"):
        next(segment.loads(0, LAYERS))


def test_placements_of_retired_segments_are_in_the_history(root: Path) -> None:
    before = open_run(root).history
    thin_to(folder_of(root), TIERS)
    after = open_run(root).history
    assert not after.lost
    for step in range(4 * STEPS, SEGMENTS * STEPS):
        for layer in range(LAYERS):
            assert np.array_equal(after.layer(layer).at(step), before.layer(layer).at(step))


def test_what_a_kill_brings_back_is_ignored_and_recover_removes_it(
    root: Path, journals: dict[str, bytes]
) -> None:
    folder = folder_of(root)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    thin_to(folder, TIERS)
    kept, _ = opened(root)
    for name, data in files.items():  # every file that was removed
        if not (folder / name).exists():
            (folder / name).write_bytes(data)
    for seq in (1, 4):
        (folder / journal_name(seq)).write_bytes(journals[journal_name(seq)])
    (folder / journal_name(2)).write_bytes(b"torn")
    session, findings = opened(root)
    assert [f.code for f in findings] == ["leftover_files"]
    assert [f.severity for f in findings] == ["info"]
    assert [s.seq for s in session.segments] == [s.seq for s in kept.segments]
    assert all(isinstance(s, ParquetSegment) for s in session.segments)
    assert session.thinned == kept.thinned
    assert session.journals == 0
    recover_dump(root)
    assert opened(root)[1] == []
    assert not [*folder.glob("journal-*")]
    assert [(s.seq, s.has_loads) for s in opened(root)[0].segments] == [
        (4, False), (5, False), (6, True), (7, True)
    ]  # fmt: skip


def test_what_a_writer_thins_meanwhile_is_read_as_it_is_now(root: Path) -> None:
    run = open_run(root)
    session = run.sessions[0]
    thin_to(folder_of(root), TIERS, merged=True)
    assert np.array_equal(run.retry_without_damaged(lambda: _read(run)), np.arange(16, 32))
    assert not run.findings
    assert [s.seq for s in session.segments] == [4, 5, 6, 7]
    assert [(s.seq, s.last_seq) for s in session.retired] == [(0, 1), (2, 3)]
    assert not refresh_thinned(session)


def thin_while_read(run: Run, root: Path) -> list[int]:
    """All segments but the last, once the first block is done; how many steps that were is in the result."""
    thinned: list[int] = []

    def thin_once(done: int, of: int) -> None:
        if not thinned:
            thinned.append(done)
            thin_to(folder_of(root), {Tier.RANKS: range(SEGMENTS - 1)})

    run.progress = thin_once
    return thinned


def test_loads_that_a_writer_thins_while_they_are_read_are_left_out(root: Path) -> None:
    run = open_run(root)
    thinned = thin_while_read(run, root)
    assert expert_report(run).to_json() == expert_report(open_run(root)).to_json()
    assert thinned == [STEPS]


def test_loads_that_are_thinned_after_steps_were_chosen_are_skipped(root: Path) -> None:
    run = open_run(root)
    thinned = thin_while_read(run, root)
    assert run.loads()["step"].unique().sort().to_list() == [*range((SEGMENTS - 1) * STEPS, SEGMENTS * STEPS)]
    assert thinned == [STEPS]
    assert {f.text.rpartition(": ")[2] for f in run.findings} == {
        "experts' loads are no longer kept; skipped"
    }


def test_manifest_that_became_a_pipe_is_not_waited_for(root: Path) -> None:
    (session,) = open_run(root).sessions
    manifest = folder_of(root) / MANIFEST_FILE
    manifest.unlink()
    os.mkfifo(manifest)
    assert [segment.sums for segment in session.segments] == [None] * SEGMENTS


def test_file_that_is_missing_although_the_manifest_lists_it_is_damage(root: Path) -> None:
    run = open_run(root)
    thin_to(folder_of(root), TIERS)
    (folder_of(root) / "ranks-000004.parquet").unlink()
    assert np.array_equal(run.retry_without_damaged(lambda: _read(run)), np.arange(20, 32))
    assert [f.code for f in run.findings] == ["damaged_file"]


def _read(run: Run) -> object:
    return np.concatenate(
        [
            block.recorded
            for block in run.blocks()
            if block.shape and len(block.rank_load()) == len(block.recorded)
        ]
    )
