"""The steps that a command is about: by number, by time and by phase."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clocks import PlantedClock
from helpers import cli, one_error

from eplb_analyze import open_run
from eplb_analyze.transfer.importers.import_dump import import_dump
from eplb_analyze.transfer.importers.source import Options
from eplb_dump import ExpertLoadWriter, writer

SECOND = 10**9
#: 2026-11-26 23:59:30 UTC: the run of 60 steps, one a second, crosses midnight.
START = 1_795_737_570 * SECOND
STEPS, LAYERS, SLOTS = 60, 2, 6


def phase_of(step: int) -> str:
    return "prefill" if step % 4 == 0 else "decode"


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dump")
    rng = np.random.default_rng(0)
    placements = [np.array([[0, 1, 2, 3, 0, 1]] * LAYERS), np.array([[0, 1, 2, 3, 2, 1]] * LAYERS)]
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(2):
            clock = PlantedClock(START)
            patch.setattr(writer, "time", clock)
            with ExpertLoadWriter(
                root, model="m", num_logical_experts=4, ep_size=2, ep_rank=rank, run_id="r", segment_steps=16
            ) as opened:
                for step in range(STEPS):
                    load = rng.integers(0, 50, (LAYERS, SLOTS)) * (9 if phase_of(step) == "prefill" else 1)
                    opened.record(step, load, placements[step >= 30], phase=phase_of(step))
                    clock.ns += SECOND
                assert opened.flush(60)
    return root


def document(*arguments: str | Path) -> dict[str, Any]:
    result = cli(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def steps_of(*arguments: str | Path) -> tuple[int, int, int]:
    steps = document("summary", *arguments)["steps"]
    return steps["first"], steps["last"], steps["recorded"]


@pytest.mark.parametrize(
    ("options", "first", "last"),
    [
        (["--since", "23:59:40"], 10, 59),
        (["--until", "23:59:40"], 0, 11),
        (["--until", "23:59:40.0"], 0, 11),
        (["--until", "23:59:40.000000000"], 0, 10),
        (["--until", "23:59:30"], 0, 1),
        (["--since", "00:00:29"], 59, 59),
        (["--since", "23:59:40.5", "--until", "00:00:10"], 11, 41),
        (["--since", "2026-11-27T00:00:00Z"], 30, 59),
        (["--since", "2026-11-27T01:00:00+01:00"], 30, 59),
        (["--since", "-10s"], 49, 59),
        (["--until", "-0.5m"], 0, 29),
        (["--at", "00:00:04"], 34, 34),
        (["--at", "00:00:03.5"], 34, 34),
        (["--since", "01:00:00", "--tz", "Europe/Berlin"], 30, 59),
        (["--since", "19:00", "--tz", "America/New_York"], 30, 59),
        (["--steps", "5-20", "--since", "23:59:40"], 10, 20),
    ],
)
def test_range_of_time_selects_the_steps_in_progress(
    dump: Path, options: list[str], first: int, last: int
) -> None:
    assert steps_of(dump, *options) == (first, last, last - first + 1)


@pytest.mark.parametrize(
    "command",
    [
        ["summary"], ["layer", "0"], ["experts"], ["ranks"], ["timeline"], ["traffic"], ["rearrangements"],
        ["replay", "--interval-steps", "5", "--policy", "static"], ["advise", "--policy", "static"],
    ],
)  # fmt: skip
def test_every_command_takes_times_as_it_takes_steps(dump: Path, command: list[str]) -> None:
    by_time = document(*command, dump, "--since", "23:59:35", "--until", "00:00:20")
    # The last second includes the step that was in progress when it ended.
    assert by_time == document(*command, dump, "--steps", "5-51")


def test_step_at_a_time_is_that_step(dump: Path) -> None:
    for command in (["layer", "0"], ["placement"]):
        assert document(*command, dump, "--at", "00:00:02") == document(*command, dump, "--step", "32")
    assert document("placement", dump, "--at", "23:59:50")["step"] == 20


def test_copy_and_export_take_times(dump: Path, tmp_path: Path) -> None:
    assert cli("copy", dump, tmp_path / "copy", "--since", "00:00:20").returncode == 0
    assert open_run(tmp_path / "copy").step_range == (48, 59)
    options = (
        "--as",
        "parquet",
        "--since",
        "00:00:20",
        "--phase",
        "prefill",
        "-o",
        tmp_path / "loads.parquet",
    )
    assert document("export", "loads", dump, *options)["recorded"] == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--since", "03:12"], ["03:12:00 UTC is outside", "23:59:30 to 2026-11-27 00:00:29 UTC"]),
        (["--until", "23:00"], ["outside the time of the run"]),
        (["--at", "00:10"], ["outside the time of the run"]),
        (["--since", "00:00:10", "--until", "23:59:40"], ["00:00:10 UTC is after --until"]),
        (["--steps", "0-9", "--since", "00:00"], ["steps 30-59 were in progress", "--steps selects 0-9"]),
        (["--phase", "verify"], ["no step of the run has the phase 'verify'", "decode, prefill"]),
    ],
)  # fmt: skip
def test_what_selects_no_step_is_refused(dump: Path, options: list[str], words: list[str]) -> None:
    one_error(cli("summary", dump, *options), 2, *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--at", "00:00", "--since", "23:59"], ["--at", "one step"]),
        (["--at", "00:00", "--step", "3"], ["--at", "one step"]),
        (["--step", "3", "--since", "00:00"], ["--step", "one step"]),
        (["--since", "noon"], ["--since", "'noon' is not a time; write 03:12"]),
        (["--tz", "Mars/Olympus"], ["--tz", "not a known time zone"]),
        (["--tz", "../../etc/passwd"], ["--tz", "not a known time zone"]),
    ],
)
def test_option_that_is_wrong_is_a_usage_error(dump: Path, options: list[str], words: list[str]) -> None:
    result = cli("summary", dump, *options)
    assert result.returncode == 2
    assert all(word in result.stderr for word in words), result.stderr


def test_imported_run_without_times_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "loads.npy", np.ones((5, LAYERS, SLOTS), np.int64))
    known = Options(ep_size=2, num_logical_experts=SLOTS, placement="linear")
    import_dump(tmp_path / "loads.npy", tmp_path / "dump", "array", known)
    one_error(
        cli("summary", tmp_path / "dump", "--since", "-10m"), 2, "times of its steps are not known", "--steps"
    )
    assert "UTC" not in cli("ranks", tmp_path / "dump").stdout


# ---- one phase


@pytest.mark.parametrize(
    "command",
    [
        ["summary"], ["layer", "0"], ["experts"], ["ranks"], ["timeline"], ["traffic"],
        ["replay", "--interval-steps", "5", "--policy", "static"],
    ],
)  # fmt: skip
def test_figures_of_a_phase_are_over_its_steps_only(dump: Path, command: list[str]) -> None:
    found = document(*command, dump, "--phase", "prefill")
    counts = found["steps"] if isinstance(found.get("steps"), dict) else {"recorded": found["steps"]}
    assert counts["recorded"] == 15
    assert counts.get("missing", 0) == 0


def test_loads_of_a_phase_are_those_of_its_steps(dump: Path) -> None:
    run = open_run(dump)
    every = run.loads()
    for name in ("prefill", "decode"):
        steps = [step for step in range(STEPS) if phase_of(step) == name]
        assert run.of_phase(name).loads().equals(every.filter(every["step"].is_in(steps)))
    assert run.of_phase("prefill").balancedness(by="run")["steps"].item() == 15
    assert run.of_phase("prefill").of_phase("decode").steps().height == 45


def test_range_without_a_step_of_the_phase_has_no_figures(dump: Path) -> None:
    one_error(
        cli("summary", dump, "--phase", "prefill", "--steps", "1-3"),
        3,
        "no step of phase prefill in this range",
    )


def test_rearrangements_of_a_phase_compare_its_steps(dump: Path) -> None:
    (row,) = document("rearrangements", dump, "--phase", "decode")["rearrangements"]
    assert row["first_step"] == 30


def test_report_is_of_the_phase(dump: Path, tmp_path: Path) -> None:
    written = document(
        "report", dump, "-o", tmp_path / "report.html", "--phase", "prefill", "--since", "00:00"
    )
    assert written["steps"]["recorded"] == 7


def test_advice_is_from_the_steps_of_a_phase(dump: Path) -> None:
    advice = document("advise", dump, "--phase", "decode", "--policy", "static")
    assert advice["reasons"][0].startswith("45 complete steps")


# ---- both sides of `compare`


def sides(*arguments: str | Path) -> dict[str, Any]:
    return {name: side for name, side in document("compare", *arguments).items() if name in ("a", "b")}


def test_phases_of_a_run_are_compared(dump: Path) -> None:
    found = sides("--phase-a", "decode", "--phase-b", "prefill", dump)
    assert [(side["phase"], side["steps"]["recorded"]) for side in found.values()] == [
        ("decode", 45), ("prefill", 15),
    ]  # fmt: skip
    assert found["b"]["tokens_per_step"] > 5 * found["a"]["tokens_per_step"]
    text = cli("compare", "--phase-a", "decode", "--phase-b", "prefill", dump).stdout
    assert "45 complete decode steps" in " ".join(text.split())
    one_error(cli("compare", "--phase", "decode", dump), 2, "share steps", "--phase-a, --phase-b")
    one_error(cli("compare", "--phase-a", "decode", dump), 2, "share steps")
    one_error(cli("compare", "--phase-a", "", dump), 2, "no step of the run has the phase ''")


def test_phase_and_times_apply_to_both_sides(dump: Path) -> None:
    halves = "--steps-a", "-29", "--steps-b", "30-"
    found = sides(*halves, "--phase", "decode", dump)
    assert [(side["phase"], side["steps"]["recorded"]) for side in found.values()] == [
        ("decode", 22), ("decode", 23),
    ]  # fmt: skip
    by_time = sides(*halves, "--since", "23:59:35", "--until", "00:00:20", dump)
    assert by_time == sides("--steps-a", "5-29", "--steps-b", "30-51", dump)
    local = ("--since", "00:59:35", "--until", "01:00:20", "--tz", "Europe/Berlin")
    assert sides(*halves, *local, dump) == by_time
    text = " ".join(cli("compare", *halves, *local, dump).stdout.split())
    assert "A r, steps 5-29, 2026-11-27 00:59:35-00:59:59 CET (24.0 s): 25 complete steps" in text
    one_error(cli("compare", *halves, "--since", "00:00:10", dump), 2, "--steps selects 0-29")
