"""Thinning a session: the policy as pure decisions, and files that survive a kill at any step."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import LAYERS, SLOTS, load_of, map_of, open_writer, session_info
from hypothesis import given
from hypothesis import strategies as st
from kills import Killed, kill_before

from eplb_dump.format import frames, retention
from eplb_dump.format.journal import Shape
from eplb_dump.format.manifest import Manifest, SealedFile, SealedSegment, Thinned
from eplb_dump.format.minutes import Minutes
from eplb_dump.format.retention import (
    NOTABLE_SHARE,
    SHARES,
    TIERS,
    Thinning,
    next_thinning,
    read_manifest,
    remove_leftovers,
    thin,
)
from eplb_dump.format.schema import MANIFEST_FILE, FormatError, Tier, segment_name
from eplb_dump.format.session import SessionInfo

SEGMENTS, STEPS = 6, 4
SHAPE = Shape(2, LAYERS, SLOTS)


# ---- the policy


def entry(
    seq: int, size: int, tier: Tier = Tier.FULL, *, last: int | None = None, notable: bool = False
) -> SealedSegment:
    table = {Tier.FULL: "loads", Tier.RANKS: "ranks", Tier.MINUTES: "minutes", Tier.GONE: "placements"}[tier]
    files = {table: SealedFile(segment_name(table, seq, last), size, 1, 0)}
    thinned = None if tier is Tier.FULL else Thinned(tier, seq if last is None else last, 1, 1, "budget")
    times = (seq * 10, seq * 10 + 9)
    reasons = ("rearrangement",) if notable else ()
    return SealedSegment(seq, seq, seq, SHAPE, files, times=times, notable=reasons, thinned=thinned)


def thinned(entries: list[SealedSegment], thinning: Thinning) -> list[SealedSegment]:
    """The entries after a thinning, in which each tier takes a fifth of the one above it.

    What is gone leaves the placements of one moment, 1 byte.
    """
    chosen = [e for e in entries if e.seq in thinning.seqs]
    size = sum(e.size for e in chosen)
    if len(chosen) == 1:
        size = size // 5 ** (TIERS.index(thinning.tier) - TIERS.index(chosen[0].tier))
    if thinning.tier is Tier.GONE:
        size = 1
    new = entry(chosen[0].seq, size, thinning.tier, last=chosen[-1].last_seq)
    assert new.thinned is not None
    new = replace(new, thinned=replace(new.thinned, reason=thinning.reason))
    new = replace(new, notable=tuple(r for e in chosen for r in e.notable), times=(0, chosen[-1].times[1]))
    return [e for e in entries if e.seq not in thinning.seqs] + [new]


@given(
    st.lists(st.tuples(st.integers(1, 1000), st.booleans()), min_size=1, max_size=60),
    st.integers(1, 30_000),
)
def test_thinning_ends_within_the_budget_and_spares_the_newest(
    sizes: list[tuple[int, bool]], budget: int
) -> None:
    entries = [entry(seq, size, notable=notable) for seq, (size, notable) in enumerate(sizes)]
    newest = entries[-1]
    for _ in range(1000):
        todo = next_thinning(entries, budget=budget)
        if todo is None:
            break
        before = {e.seq: e for e in entries}
        assert all(TIERS.index(before[seq].tier) <= TIERS.index(todo.tier) for seq in todo.seqs)
        entries = thinned(entries, todo)
        covered = sorted((e.seq, e.last_seq) for e in entries)
        assert covered[0][0] == 0
        assert covered[-1][1] == len(sizes) - 1
        assert all(one[1] + 1 == other[0] for one, other in itertools.pairwise(covered))
    else:
        pytest.fail("it does not end")
    assert newest in entries
    others = [e for e in entries if e is not newest]
    within = sum(e.size for e in entries) <= budget
    assert within or all(e.tier is Tier.GONE for e in others)


def test_tiers_keep_their_shares_of_the_budget() -> None:
    entries: list[SealedSegment] = []
    for seq in range(800):
        entries.append(entry(seq, 100))
        while (todo := next_thinning(entries, budget=10_000)) is not None:
            entries = thinned(entries, todo)
    sizes = {tier: sum(e.size for e in entries if e.tier is tier) for tier in TIERS}
    assert 9_000 <= sum(sizes.values()) <= 10_000
    for tier, share in SHARES.items():
        assert abs(sizes[tier] - share * 10_000) <= 1_500
    ages = [TIERS.index(e.tier) for e in sorted(entries, key=lambda e: e.seq)]
    assert ages == sorted(ages, reverse=True)
    assert len(entries) < 300  # neighboring roll-ups are merged


def test_notable_segments_and_their_neighbors_are_kept_longer_within_their_share() -> None:
    noted = {10, 30}
    entries: list[SealedSegment] = []
    for seq in range(150):
        entries.append(entry(seq, 100, notable=seq in noted))
        while (todo := next_thinning(entries, budget=10_000)) is not None:
            entries = thinned(entries, todo)
    full = {e.seq for e in entries if e.tier is Tier.FULL}
    assert {9, 10, 11, 29, 30, 31} <= full
    assert not full & {8, 12, 28, 32}
    entries = [replace(e, notable=("imbalance",)) for e in entries]
    while (todo := next_thinning(entries, budget=5_000)) is not None:
        entries = thinned(entries, todo)
    kept = sum(e.size for e in entries if e.tier is Tier.FULL)
    assert NOTABLE_SHARE * 5_000 <= kept <= SHARES[Tier.FULL] * 5_000


def test_what_is_older_than_the_limit_is_gone_in_every_tier() -> None:
    entries = [entry(0, 10, Tier.MINUTES), entry(1, 10, Tier.RANKS), entry(2, 10), entry(3, 10)]
    while (todo := next_thinning(entries, before_ns=25)) is not None:
        assert (todo.tier, todo.reason) == (Tier.GONE, "age")
        entries = thinned(entries, todo)
    assert [(e.seq, e.last_seq, e.tier) for e in sorted(entries, key=lambda e: e.seq)] == [
        (0, 1, Tier.GONE),
        (2, 2, Tier.FULL),
        (3, 3, Tier.FULL),
    ]


# ---- the files


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A session of six segments; the placement changes in the third."""
    root = tmp_path_factory.mktemp("recorded")
    with open_writer(root, scope="global", segment_steps=STEPS) as writer:
        for step in range(SEGMENTS * STEPS):
            writer.record(step, load_of(step), map_of(step // 9), phase="decode")
        assert writer.close(60)
    return writer.folder


@pytest.fixture
def folder(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "session"))


def info_of(folder: Path) -> SessionInfo:
    with (folder / MANIFEST_FILE).open("rb") as file:
        first = next(frames.scan(file, (folder / MANIFEST_FILE).stat().st_size))
    assert isinstance(first, frames.Frame)
    return SessionInfo.from_dict(first.header["session"])


def table(folder: Path, listed: SealedSegment, name: str) -> list[dict[str, Any]]:
    columns = [c for c in retention.SCHEMAS[name].names if c != "time"]
    return pq.read_table(folder / listed.files[name].name, columns=columns).to_pylist()


def assert_readable(folder: Path) -> Manifest:
    """Every listed file is whole, and says what was recorded."""
    manifest = read_manifest(folder, info_of(folder))
    assert manifest.closed is not None
    covered = [seq for e in manifest.entries.values() for seq in range(e.seq, e.last_seq + 1)]
    assert sorted(covered) == list(range(SEGMENTS))
    known: dict[int, list[int]] = {}
    for seq in sorted(manifest.entries):
        listed = manifest.entries[seq]
        steps = range(listed.seq * STEPS, (listed.last_seq + 1) * STEPS)
        assert (listed.first_step, listed.last_step) == (steps[0], steps[-1])
        assert listed.recorded == len(steps)
        for file in listed.files.values():
            assert (folder / file.name).stat().st_size == file.bytes
        if "placements" in listed.files:
            for row in table(folder, listed, "placements"):
                known[row["layer"]] = row["physical_to_logical"]
        assert known == dict(enumerate(map_of(steps[-1] // 9).tolist()))
        by_rank = {step: load_of(step).reshape(LAYERS, 2, -1).sum(axis=2) for step in steps}
        for name in {"loads", "ranks"} & listed.files.keys():
            for row in table(folder, listed, name):
                assert row["rank_load"] == by_rank[row["step"]][row["layer"]].tolist()
        if "minutes" in listed.files:
            rolled = Minutes.from_table(pq.read_table(folder / listed.files["minutes"].name), listed.shape)
            total = rolled["rank_load"].sum(axis=0).reshape(LAYERS, 2)
            assert (total == sum(by_rank.values())).all()
            assert rolled["recorded"].sum() == len(steps)
    return manifest


STAGES = [
    Thinning((0,), Tier.RANKS, "budget"),
    Thinning((1,), Tier.RANKS, "budget"),
    Thinning((0,), Tier.MINUTES, "budget"),
    Thinning((1,), Tier.MINUTES, "budget"),
    Thinning((2,), Tier.MINUTES, "budget"),
    Thinning((3,), Tier.MINUTES, "age"),
    Thinning((0, 1), Tier.MINUTES, "budget"),
    Thinning((2, 3), Tier.MINUTES, "budget"),
    Thinning((0,), Tier.GONE, "budget"),
    Thinning((2,), Tier.GONE, "budget"),
    Thinning((0, 2), Tier.GONE, "prune"),
    Thinning((4,), Tier.GONE, "age"),
    Thinning((0, 4), Tier.GONE, "age"),
]
TABLES = {
    Tier.FULL: {"steps", "loads", "minutes"},
    Tier.RANKS: {"steps", "ranks", "minutes"},
    Tier.MINUTES: {"minutes"},
    Tier.GONE: set(),
}


def test_each_tier_keeps_its_tables(folder: Path) -> None:
    for stage in STAGES:
        listed = thin(folder, info_of(folder), stage)
        assert (listed.tier, listed.seq, listed.thinned.reason) == (stage.tier, stage.seqs[0], stage.reason)
        assert listed.files.keys() - {"placements"} == TABLES[stage.tier]
        manifest = assert_readable(folder)
        files = {f.name for e in manifest.entries.values() for f in e.files.values()}
        assert {p.name for p in folder.glob("*.parquet*")} == files
    assert [(e.seq, e.last_seq, e.tier) for e in manifest.entries.values()] == [
        (0, 4, Tier.GONE),
        (5, 5, Tier.FULL),
    ]


@pytest.mark.parametrize("rewrite", [False, True])
def test_kill_at_any_step_of_thinning_leaves_a_readable_session(
    rewrite: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rewrite:
        monkeypatch.setattr(retention, "_WORTH_REWRITING", -1)
    info, kills = info_of(folder), 0
    for number, stage in enumerate(STAGES):
        for count in range(200):
            copy = Path(shutil.copytree(folder, tmp_path / f"{number}-{count}"))
            with monkeypatch.context() as patch:
                kill_before(patch, count)
                try:
                    thin(copy, info, stage)
                    break
                except Killed:
                    kills += 1
            manifest = assert_readable(copy)
            if manifest.entries[stage.seqs[0]].tier is not stage.tier or (
                len(stage.seqs) > 1 and stage.seqs[1] in manifest.entries
            ):
                thin(copy, info, stage)  # it can be repeated
            remove_leftovers(copy, info)
            files = {f.name for e in assert_readable(copy).entries.values() for f in e.files.values()}
            assert {p.name for p in copy.glob("*.parquet*")} == files
            shutil.rmtree(copy)
        folder = copy
    assert kills > 60


def test_damaged_source_is_neither_thinned_nor_removed(folder: Path) -> None:
    loads = folder / "loads-000000.parquet"
    data = bytearray(loads.read_bytes())
    data[len(data) // 2] ^= 1
    loads.write_bytes(data)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises((FormatError, OSError)):
        thin(folder, info_of(folder), STAGES[0])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    thin(folder, info_of(folder), Thinning((0,), Tier.MINUTES, "budget"))
    assert_readable(folder)


def test_leftovers_are_only_files_of_thinned_segments(folder: Path) -> None:
    info = info_of(folder)
    thin(folder, info, STAGES[0])
    kept = {p.name for p in folder.iterdir()}
    for name in ("loads-000000.parquet", "ranks-000001.parquet.tmp", "minutes-000000-000003.parquet"):
        (folder / name).write_bytes(b"x" * 10)
    unlisted = {"loads-000009.parquet", "journal-000009.frames", "notes.txt"}
    for name in unlisted:
        (folder / name).write_bytes(b"x")
    assert remove_leftovers(folder, info) == 30
    assert {p.name for p in folder.iterdir()} == kept | unlisted


def test_older_reader_skips_thinned_segments() -> None:
    frame = frames.decode_payload(entry(3, 10, Tier.RANKS).to_frame()[frames.HEAD.size :], 0)
    assert frame.kind == "thinned"
    manifest = Manifest()
    manifest.add(frames.Frame("session", {"session": session_info().to_dict()}, {}, {}, 0, 0))
    manifest.add(frame)
    assert manifest.entries[3] == entry(3, 10, Tier.RANKS)
    assert np.all([e.thinned is not None for e in manifest.entries.values()])
