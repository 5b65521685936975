"""A session that is followed while its writer thins it: nothing is read twice, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import cli, load_of, map_of, open_writer
from thinning import info_of, session_folders, thin_to

from eplb_analyze.live.session import FollowedSession
from eplb_analyze.live.watch import Follower
from eplb_dump.format import retention
from eplb_dump.format.schema import Tier, journal_name

PER_SEGMENT = 4


def sealed(root: Path, segments: int) -> Path:
    with open_writer(root, scope="global", segment_steps=PER_SEGMENT) as writer:
        for step in range(segments * PER_SEGMENT):
            writer.record(step, load_of(step), map_of(step // 6))
        assert writer.close(60)
    return session_folders(root)[0]


def steps_of(session: FollowedSession) -> list[int]:
    found = [batch.step for batch in session.look()]
    assert session.fault is None, session.fault
    return np.concatenate([np.empty(0, np.int64), *found]).tolist()


@pytest.fixture(params=[False, True], ids=["appended", "replaced"])
def thinning(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest is appended to, or replaced by a shorter one each time."""
    if request.param:
        monkeypatch.setattr(retention, "_rewrite_if_worth_it", retention.rewrite_manifest)


@pytest.mark.usefixtures("thinning")
def test_what_was_read_is_not_read_again_as_it_is_thinned(tmp_path: Path) -> None:
    folder = sealed(tmp_path, 8)
    session = FollowedSession(folder, info_of(folder), 1000)
    assert steps_of(session) == [*range(32)]
    thin_to(folder, {Tier.RANKS: [0, 1, 2, 3]})
    assert steps_of(session) == []
    thin_to(folder, {Tier.MINUTES: [0, 1, 2]}, merged=True)
    assert steps_of(session) == []
    thin_to(folder, {Tier.GONE: [0]})
    assert steps_of(session) == []
    assert session.closed


@pytest.mark.usefixtures("thinning")
@pytest.mark.parametrize("want", [6, 14, 1000])
def test_begins_with_what_is_kept(tmp_path: Path, want: int) -> None:
    folder = sealed(tmp_path, 8)
    thin_to(folder, {Tier.RANKS: [4, 5], Tier.MINUTES: [2, 3], Tier.GONE: [0, 1]}, merged=True)
    session = FollowedSession(folder, info_of(folder), want)
    session.begin(want, placements=True)
    assert steps_of(session) == [*range(16, 32)][-want:]
    thin_to(folder, {Tier.MINUTES: [4, 5], Tier.RANKS: [6]})
    assert steps_of(session) == []


@pytest.mark.usefixtures("thinning")
def test_thinned_between_the_beginning_and_the_first_look(tmp_path: Path) -> None:
    folder = sealed(tmp_path, 8)
    session = FollowedSession(folder, info_of(folder), 1000)
    session.begin(1000, placements=True)
    thin_to(folder, {Tier.RANKS: [4, 5], Tier.MINUTES: [2, 3], Tier.GONE: [0, 1]}, merged=True)
    assert sorted(steps_of(session) + steps_of(session)) == [*range(16, 32)]


def test_journal_that_came_back_is_not_read(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "one", 4)
    other = sealed(tmp_path / "two", 1)
    thin_to(folder, {Tier.MINUTES: [0, 1]}, merged=True)
    for seq in (0, 1):
        (folder / journal_name(seq)).write_bytes(b"EPLF" + other.name.encode())
    session = FollowedSession(folder, info_of(folder), 1000)
    session.begin(1000)
    assert steps_of(session) == [*range(8, 16)]


@pytest.mark.parametrize("tier", [Tier.MINUTES, Tier.GONE])
def test_closed_run_without_steps_is_not_a_dead_recorder(tier: Tier, tmp_path: Path) -> None:
    folder = sealed(tmp_path, 8)
    thin_to(folder, {tier: range(8)})
    look = Follower(tmp_path).look()
    assert (look.closed, look.newest_step, look.missing_ranks) == (True, 31, [])
    assert [(w.closed, w.stopped, w.last_step) for w in look.writers] == [(True, False, 31)]
    shown = cli("watch", "--once", tmp_path)
    assert shown.returncode == 0
    assert "ended" in shown.stdout
    assert "its newest steps were thinned" in shown.stdout
    for wrong in ("no step yet", "no complete step", "nothing from"):
        assert wrong not in shown.stdout
    metrics = cli("serve-metrics", "--once", tmp_path).stdout
    assert "eplb_run_closed 1" in metrics
    assert 'eplb_recorder_closed{rank="0"} 1' in metrics
