"""Faults that only a comparison finds: sums that lie, clocks apart, a placement that one rank missed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import LAYERS, load_of, manifest, map_of, open_writer

from eplb_analyze import open_run
from eplb_analyze.check import check_run
from eplb_dump import frames, writer
from eplb_dump.format import MANIFEST_FILE
from eplb_dump.sealing import SealedSegment


def codes(folder: Path) -> dict[str, str]:
    return {f.code: f.text for f in check_run(open_run(folder)).findings}


def record(folder: Path, rank: int, placement: Callable[[int], Any], steps: int = 40) -> Path:
    with open_writer(folder, ep_rank=rank, scope="local") as opened:
        for step in range(steps):
            opened.record(None, load_of(step, rank), placement(step))
    return opened.folder


def test_a_sound_dump_has_none_of_them(tmp_path: Path) -> None:
    for rank in range(2):
        record(tmp_path, rank, lambda step: map_of(step // 15))
    assert set(codes(tmp_path)) <= {"replica_on_same_rank", "conservation"}


def test_sums_that_are_not_those_of_the_loads(tmp_path: Path) -> None:
    for rank in range(2):
        folder = record(tmp_path, rank, lambda step: map_of(step // 15))
    session, sealed, closed = manifest(folder)
    entry = SealedSegment.from_frame(sealed)
    assert entry.sums is not None
    wrong = entry.sums.load.copy()
    wrong[LAYERS, 1] += 1
    entry = dataclasses.replace(entry, sums=dataclasses.replace(entry.sums, load=wrong))
    parts = [frames.encode(f.kind, f.header, f.arrays) for f in (session, closed)]
    (folder / MANIFEST_FILE).write_bytes(parts[0] + entry.to_frame() + parts[1])
    assert str(folder) in codes(tmp_path)["sums_differ"]


def test_a_rank_whose_clock_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = writer.time.time_ns
    for rank in range(2):
        ahead = 30 * rank
        monkeypatch.setattr(writer.time, "time_ns", lambda ahead=ahead: real() + int(ahead * 1e9))
        record(tmp_path, rank, lambda step: map_of())
    text = codes(tmp_path)["clock_skew"]
    assert "rank 0 by -15.0 s" in text or "rank 0 by -14" in text or "rank 0 by -15" in text
    assert "rank 1 by +" in text


def test_a_rank_that_missed_a_placement(tmp_path: Path) -> None:
    record(tmp_path, 0, lambda step: map_of(int(step >= 10)))
    record(tmp_path, 1, lambda step: map_of(int(step >= 13)))
    assert "first rank 1 in layer 0 at step 10" in codes(tmp_path)["placement_not_adopted"]


def test_a_rank_that_idled_at_a_change_missed_nothing(tmp_path: Path) -> None:
    record(tmp_path, 0, lambda step: map_of(int(step >= 10)))
    with open_writer(tmp_path, ep_rank=1, scope="local") as opened:
        for step in range(40):
            if 8 <= step < 20:
                opened.skip("dummy")
            else:
                opened.record(None, load_of(step, 1), map_of(int(step >= 10)))
    assert "placement_not_adopted" not in codes(tmp_path)
    assert np.array_equal(open_run(tmp_path).placement(15)["logical"].to_numpy(), map_of(1).ravel())
