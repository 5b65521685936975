"""Faults that only a comparison finds: sums that lie, clocks apart, a placement that one rank missed."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import LAYERS, cli, load_of, manifest, map_of, open_writer, write

from eplb_analyze import open_run
from eplb_analyze.analysis.check import check_run
from eplb_analyze.analysis.findings import summary_findings
from eplb_analyze.analysis.summary import summarize
from eplb_dump import writer
from eplb_dump.format import frames
from eplb_dump.format.manifest import SealedSegment
from eplb_dump.format.schema import MANIFEST_FILE


def codes(folder: Path) -> dict[str, str]:
    return {f.code: f.text for f in check_run(open_run(folder)).findings}


def record(folder: Path, rank: int, placement: Callable[[int], Any], steps: int = 40) -> Path:
    with open_writer(folder, ep_rank=rank, scope="local") as opened:
        for step in range(steps):
            opened.record(None, load_of(step, rank), placement(step))
    return opened.folder


def test_intact_dump_has_no_findings(tmp_path: Path) -> None:
    for rank in range(2):
        record(tmp_path, rank, lambda step: map_of(step // 15))
    assert set(codes(tmp_path)) <= {"replica_on_same_rank", "conservation"}


def test_check_reads_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    write(tmp_path, steps=16 * 40)
    assert len(list(tmp_path.rglob("*.parquet"))) > 2 * 40
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40));"
    code = f"{limit} from eplb_analyze.__main__ import main; main()"
    for command in ("check", "summary", "experts", "traffic"):
        out = subprocess.run(
            [sys.executable, "-c", code, command, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert (out.returncode, out.stderr) == (0, ""), command


@pytest.mark.parametrize("steps", [40, 30], ids=["complete", "second rank ends early"])
@pytest.mark.parametrize("layer", [0, LAYERS - 1])
@pytest.mark.parametrize("rank", [0, 1])
def test_sums_that_differ_from_the_loads_are_found(tmp_path: Path, rank: int, layer: int, steps: int) -> None:
    folders = [
        record(tmp_path, number, lambda step: map_of(step // 15), (40, steps)[number]) for number in range(2)
    ]
    assert "sums_differ" not in codes(tmp_path)  # and these sums are not remembered
    folder = folders[rank]
    session, sealed, closed = manifest(folder)
    entry = SealedSegment.from_frame(sealed)
    assert entry.sums is not None
    sums = entry.sums.read()
    wrong = sums.load.copy()
    wrong[np.flatnonzero(sums.layer == layer)[-1], 1] += 1
    entry = dataclasses.replace(entry, sums=dataclasses.replace(sums, load=wrong))
    parts = [frames.encode(f.kind, f.header, f.arrays) for f in (session, closed)]
    (folder / MANIFEST_FILE).write_bytes(parts[0] + entry.to_frame() + parts[1])
    assert codes(tmp_path)["sums_differ"] == f"the manifest's sums do not match the loads, in {folder}"


def test_rank_with_a_wrong_clock_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = writer.time.time_ns
    for rank in range(2):
        ahead = 30 * rank
        monkeypatch.setattr(writer.time, "time_ns", lambda ahead=ahead: real() + int(ahead * 1e9))
        record(tmp_path, rank, lambda step: map_of())
    text = codes(tmp_path)["clock_skew"]
    assert "rank 0 by -15.0 s" in text or "rank 0 by -14" in text or "rank 0 by -15" in text
    assert "rank 1 by +" in text


def test_rank_closed_long_before_the_others_is_found(tmp_path: Path) -> None:
    """Also where nobody was killed: a few steps are how ranks end, a tenth of the run is not."""
    for name, end, code in (("few", 37, "incomplete_end"), ("many", 30, "rank_stopped")):
        record(tmp_path / name, 0, lambda step: map_of())
        record(tmp_path / name, 1, lambda step: map_of(), end)
        found = codes(tmp_path / name)
        assert {"incomplete_end", "rank_stopped"} & set(found) == {code}
        assert f"the last {40 - end} steps lack ranks: rank 1 has none after {end - 1}" in found[code]
        run = open_run(tmp_path / name)
        [finding] = [f for f in summary_findings(run, summarize(run).steps) if f.code == code]
        assert finding.severity == ("error" if name == "many" else "warning")


def test_rank_that_missed_a_placement_is_found(tmp_path: Path) -> None:
    record(tmp_path, 0, lambda step: map_of(int(step >= 10)))
    record(tmp_path, 1, lambda step: map_of(int(step >= 13)))
    assert "first rank 1 in layer 0 at step 10" in codes(tmp_path)["placement_not_adopted"]


def test_rank_that_idled_at_a_change_missed_nothing(tmp_path: Path) -> None:
    record(tmp_path, 0, lambda step: map_of(int(step >= 10)))
    with open_writer(tmp_path, ep_rank=1, scope="local") as opened:
        for step in range(40):
            if 8 <= step < 20:
                opened.skip("dummy")
            else:
                opened.record(None, load_of(step, 1), map_of(int(step >= 10)))
    assert "placement_not_adopted" not in codes(tmp_path)
    assert np.array_equal(open_run(tmp_path).placement(15)["logical"].to_numpy(), map_of(1).ravel())


def test_rank_that_idled_during_a_change_and_its_reversal_missed_nothing(tmp_path: Path) -> None:
    record(tmp_path, 0, lambda step: map_of(int(10 <= step < 20)))
    with open_writer(tmp_path, ep_rank=1, scope="local") as opened:
        for step in range(40):
            if 8 <= step < 22:
                opened.skip("dummy")
            else:
                opened.record(None, load_of(step, 1), map_of(0))
    assert "placement_not_adopted" not in codes(tmp_path)


@pytest.mark.parametrize(("bad", "severity"), [(4, "warning"), (30, "error")])
def test_rank_without_loads_has_not_stopped(tmp_path: Path, bad: int, severity: str) -> None:
    """It is there to the end: what is wrong is said, and where it is little it ends no watchman's night."""
    for rank in range(2):
        with open_writer(tmp_path, ep_rank=rank) as writer:
            for step in range(100):
                wrong = rank == 1 and step >= 100 - bad
                writer.record(step, -load_of(step) - 1 if wrong else load_of(step), map_of())
    findings = {f.code: f for f in check_run(open_run(tmp_path)).findings}
    assert not {"rank_stopped", "incomplete_end"} & findings.keys()
    finding = findings["incomplete_steps"]
    assert (finding.code, finding.severity) == ("incomplete_steps", severity)
    assert (
        finding.text == f"{bad} steps lack a rank and are left out of all figures: rank 1 rejected in {bad}"
    )
    assert cli("summary", tmp_path).returncode == (3 if severity == "error" else 0)


def test_no_command_calls_a_run_complete_if_all_loads_were_rejected(tmp_path: Path) -> None:
    for rank in range(2):
        with open_writer(tmp_path, ep_rank=rank) as writer:
            for step in range(20):
                writer.record(step, -load_of(step) - 1, map_of())
    result = cli("summary", tmp_path)
    assert result.returncode == 3
    assert "no step is complete (20 rejected), so there are no figures" in " ".join(result.stderr.split())
    assert codes(tmp_path).keys() >= {"rejected_steps", "no_complete_step"}
