"""Copies of a session that is thinned between two copies, or during one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import load_of, map_of, open_writer
from thinning import session_folders, thin_to

from eplb_analyze import open_run
from eplb_analyze.analysis.check import check_run
from eplb_analyze.transfer.copy import copy_run
from eplb_analyze.transfer.copy_target import Target
from eplb_dump.format.schema import Tier

SEGMENTS, STEPS = 8, 4
TIERS = {Tier.RANKS: [4, 5], Tier.MINUTES: [2, 3], Tier.GONE: [0, 1]}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recorded")
    with open_writer(root, scope="global", segment_steps=STEPS) as writer:
        for step in range(SEGMENTS * STEPS):
            writer.record(step, load_of(step), map_of(step // 9))
        assert writer.close(60)
    return root


@pytest.fixture
def root(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "dump"))


def tiers(root: Path) -> list[tuple[int, int, str]]:
    return [(one.steps.first, one.steps.end - 1, one.tier.value) for one in open_run(root).tiers.ranges]


def assert_sound(root: Path) -> None:
    errors = {f.code for f in check_run(open_run(root)).findings if f.severity == "error"}
    assert errors <= {"conservation"}  # these loads are made up


@pytest.mark.parametrize("merged", [False, True])
def test_later_copy_keeps_what_the_source_thinned_since(root: Path, tmp_path: Path, merged: bool) -> None:
    to = tmp_path / "to"
    copy_run(root, to)
    thin_to(session_folders(root)[0], TIERS, merged=merged)
    report = copy_run(root, to)
    assert report.damaged == []
    assert tiers(to) == []
    assert open_run(to).step_range == (0, SEGMENTS * STEPS - 1)
    assert_sound(to)
    copy_run(root, to)
    assert tiers(to) == []


def test_copy_of_a_session_that_is_thinned_meanwhile(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, names = Target.put, []

    def thinning(self: Target, name: str, *args: object, **options: object) -> object:
        names.append(name)
        if name == "loads-000001.parquet":
            thin_to(session_folders(root)[0], TIERS, merged=True)
        return put(self, name, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Target, "put", thinning)
    report = copy_run(root, tmp_path / "to")
    assert names.count("manifest.frames") == 1
    assert report.damaged == []
    assert tiers(tmp_path / "to") == tiers(root) == [(0, 7, "gone"), (8, 15, "minutes"), (16, 23, "ranks")]
    copied, source = (session_folders(where)[0] for where in (tmp_path / "to", root))
    assert {path.name for path in copied.iterdir()} == {path.name for path in source.iterdir()}
    assert_sound(tmp_path / "to")
