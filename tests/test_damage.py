"""Flipped bits and truncated files: an error or the truth, never a wrong figure, never a traceback."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import run_child

from eplb_analyze import DumpError, open_run
from eplb_analyze.check import check_run
from eplb_analyze.errors import Finding


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed segment and an open journal, as a killed writer leaves them."""
    root = tmp_path_factory.mktemp("small")
    script = """
        import os, sys, time
        from helpers import load_of, map_of, open_writer
        writer = open_writer(sys.argv[1], scope="global", segment_steps=4, num_logical_experts=6)
        for step in range(6):
            writer.record(step, load_of(step), map_of(step // 3), num_tokens=step, phase="decode")
            writer.flush()
        deadline = time.monotonic() + 20
        while len(list(writer.folder.glob("journal-*"))) > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        os._exit(0)
    """
    run_child(script, root)
    assert len(list(root.rglob("*.parquet"))) == 3
    assert len(list(root.rglob("journal-*"))) == 1
    return root


Everything = tuple[list[Finding], dict[str, Any]]


def read_everything(root: Path, *, check: bool = True) -> Everything | None:
    """All that a run says, and the findings; None where the dump is refused as a whole."""
    try:
        run = open_run(root)
        content = {
            "loads": run.loads().rows(),
            "steps": run.steps().rows(),
            "placements": run.placements().rows(),
            "info": run.info,
        }
        if check:
            check_run(run)
    except DumpError:
        return None
    return run.findings, content


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def flip_and_judge(root: Path, flips: int, seed: int) -> tuple[int, int]:
    """Flip random bits, one at a time; how many changed nothing, and how many were reported."""
    truth = read_everything(root)
    assert truth is not None
    files = sorted(p for p in root.rglob("*") if p.is_file())
    rng = random.Random(seed)
    harmless = reported = 0
    for _ in range(flips):
        path = rng.choices(files, [p.stat().st_size for p in files])[0]
        bit = rng.randrange(path.stat().st_size * 8)
        flip(path, bit)
        found = read_everything(root)
        if found is None or any(f.severity == "error" for f in found[0]):
            reported += 1
        else:
            harmless += 1
            assert found[1] == truth[1], f"{path.name}, bit {bit}: a wrong figure, and no error"
        flip(path, bit)
    return harmless, reported


@pytest.mark.parametrize("seed", range(4))
def test_a_thousand_flipped_bits(small: Path, tmp_path: Path, seed: int) -> None:
    root = shutil.copytree(small, tmp_path / "dump")
    harmless, reported = flip_and_judge(root, 300, seed)
    assert harmless + reported == 300
    assert reported > 250


@pytest.mark.long
def test_ten_thousand_flipped_bits(small: Path, tmp_path: Path) -> None:
    harmless, reported = flip_and_judge(shutil.copytree(small, tmp_path / "dump"), 10_000, 99)
    print(f"{reported} reported, {harmless} without effect")


def kind(path: Path) -> str:
    return path.name.split("-")[0]


@pytest.mark.parametrize(
    "name", ["journal", "manifest.frames", "session.json", "loads", "steps", "placements"]
)
def test_truncation_at_every_byte(small: Path, tmp_path: Path, name: str) -> None:
    root = shutil.copytree(small, tmp_path / "dump")
    truth = read_everything(root)
    assert truth is not None
    full = {row[:2]: row for row in truth[1]["loads"]}
    (path,) = (p for p in root.rglob("*") if p.is_file() and kind(p) == name)
    data = path.read_bytes()
    survivors = []
    for length in range(len(data)):
        path.write_bytes(data[:length])
        found = read_everything(root, check=False)
        rows = [] if found is None else found[1]["loads"]
        assert all(full[row[:2]] == row for row in rows), length
        survivors.append(len(rows))
        if name == "journal":
            # A prefix of a journal is a journal: what is whole in it counts, the rest is torn.
            assert found is not None
            assert [f for f in found[0] if f.severity == "error"] == []
            steps = [row[0] for row in rows]
            assert steps == sorted(steps)
            assert {0, 1, 2, 3} <= set(steps)
        elif found is not None and len(rows) < len(full):
            # What was lost is said. (A manifest cut between frames lists less, but its files are there.)
            assert any(f.severity == "error" for f in found[0]), length
    if name == "journal":
        assert survivors == sorted(survivors)
        assert set(survivors) == {12, 15}  # steps 0 to 3, then 4; step 5 needs the last byte
