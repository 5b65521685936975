"""Every command on a recording that has all four tiers at once, each rank its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_lines import ARGUMENTS
from helpers import cli, write
from thinning import session_folders, thin_to

from eplb_analyze import open_run
from eplb_analyze.report.document import report_document
from eplb_dump.format.schema import Tier

#: Commands of which the result is not about steps; what the others say of the tiers.
SILENT = {
    "runs",
    "placement",
    "export placement",
    "import",
    "copy",
    "formulas",
    "watch",
    "serve-metrics",
    "recover",
}
FROM_MINUTES = {"summary", "timeline", "report", "postmortem"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    write(folder / "dump", steps=320, step_ms=1000)
    for rank, session in enumerate(session_folders(folder / "dump")):
        gone, minutes, ranks = 4 + rank, 8 + rank, 14 + rank
        thin_to(
            session,
            {Tier.RANKS: range(minutes, ranks), Tier.MINUTES: range(gone, minutes), Tier.GONE: range(gone)},
            merged=True,
        )
    np.save(folder / "loads.npy", np.ones((4, 2, 6), np.int64))
    return folder


@pytest.mark.parametrize("command", [name for name in ARGUMENTS if name != "prune"])
def test_command_says_what_it_leaves_out(
    command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    arguments = (
        ARGUMENTS[command]
        .format(form="text")
        .replace("--steps-a -11 --steps-b 12-", "--steps-a -270 --steps-b 271-")
    )
    result = cli(*command.split(), *arguments.split())
    if command == "compact":
        assert result.returncode == 3
        assert result.stderr.count("\n") == 1
        assert "retired: steps 0-79" in result.stderr
        assert "prune --merge-ranks" in result.stderr
        return
    assert result.returncode in ((0, 1) if command == "compare" else (0,)), result.stderr
    notes = [line for line in result.stderr.splitlines() if not line.startswith("eplb-analyze: note:")]
    assert notes == []
    said = " ".join((result.stdout + result.stderr).split())
    if command in FROM_MINUTES:
        assert "per-minute" in said or command == "report"
    elif command == "check":
        assert "retired_steps" in said
    elif command not in SILENT:
        assert "eft out: steps 0-79 (22:13:22-22:14:41), of which nothing is kept (budget)" in said
        assert "steps 80-143 (22:14:42-22:15:45), of which only sums per minute are kept (budget)" in said
    for word in ("lack a rank", "damaged", "not complete") if command != "serve-metrics" else ():
        assert word not in said


def test_documents_list_the_ranges(folder: Path) -> None:
    def retired(*arguments: str) -> list[tuple[int, int, str]]:
        result = cli(*arguments, "--json", folder / "dump")
        found = json.loads(result.stdout).get("retired", [])
        assert all(one["first_time"] < one["last_time"] and one["reasons"] == ["budget"] for one in found)
        return [(one["first_step"], one["last_step"], one["tier"]) for one in found]

    gone, minutes, ranks = (0, 79, "gone"), (80, 143, "minutes"), (144, 239, "ranks")
    assert retired("ranks") == [gone, minutes]
    assert retired("experts") == [gone, minutes, ranks]
    assert retired("rearrangements", "--steps", "200-300") == [(200, 239, "ranks")]
    assert retired("experts", "--steps", "250-300") == []
    line = json.loads(cli("runs", "--json", folder / "dump").stdout)["runs"][0]
    assert (line["first_step"], line["last_step"], line["steps"]) == (0, 319, 320)
    assert line["retired_steps"] == 9 * 16
    assert line["tiers"] == ["full", "ranks", "minutes", "gone"]
    assert line["fault"] is None


def test_copy_is_the_same_recording(folder: Path, tmp_path: Path) -> None:
    assert cli("copy", folder / "dump", tmp_path / "all").returncode == 0
    copied = tmp_path / "all"
    names = {path.relative_to(copied) for path in copied.rglob("*") if path.is_file()}
    assert names == {p.relative_to(folder / "dump") for p in (folder / "dump").rglob("*") if p.is_file()}
    assert all((copied / name).read_bytes() == (folder / "dump" / name).read_bytes() for name in names)
    assert cli("copy", "--steps", "100-260", folder / "dump", tmp_path / "part").returncode == 0
    part = tmp_path / "part"
    for command in ("experts", "ranks"):
        whole = json.loads(cli(command, "--steps", "0-271", "--json", folder / "dump").stdout)
        found = json.loads(cli(command, "--json", part).stdout)
        assert found["retired"][0]["tier"] == "minutes"
        for document in (whole, found):
            del document["retired"]
        assert found == whole
    assert cli("check", part).returncode == 0


def test_manifest_that_is_lost_is_rebuilt_with_its_tiers(folder: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(folder / "dump", tmp_path / "dump"))
    before = json.loads(cli("experts", "--json", root).stdout)
    for session in session_folders(root):
        (session / "manifest.frames").unlink()
    assert cli("experts", root).stderr.count("it is missing; segments are read from their files") == 2
    for _ in range(2):
        after = json.loads(cli("experts", "--json", root).stdout)
        tiers = [(one["tier"], one["reasons"]) for one in after.pop("retired")]
        assert tiers == [("gone", ["unknown"]), ("minutes", ["unknown"]), ("ranks", ["unknown"])]
        assert after == {key: value for key, value in before.items() if key != "retired"}
        cli("recover", root)


@pytest.fixture
def one_tier(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """All segments of both ranks in the tier of the parameter."""
    write(tmp_path / "dump", steps=64, step_ms=1000)
    for session in session_folders(tmp_path / "dump"):
        thin_to(session, {request.param: range(4)})
    return tmp_path / "dump"


@pytest.mark.parametrize("one_tier", [Tier.RANKS, Tier.MINUTES, Tier.GONE], indirect=True)
def test_runs_and_check_show_what_is_kept(one_tier: Path) -> None:
    (line,) = json.loads(cli("runs", "--json", one_tier).stdout)["runs"]
    (tier,) = line["tiers"]
    listed = cli("runs", one_tier).stdout
    assert "kept" in listed.splitlines()[2]
    assert f" {tier} " in listed
    report = cli("check", one_tier)
    assert report.returncode == 0
    said = " ".join(report.stdout.split())
    what = {
        "ranks": "only tokens per EP rank are",
        "minutes": "only sums per minute are",
        "gone": "nothing is",
    }
    assert f"of which {what[tier]} kept (budget)" in said
    assert not any(line.rstrip().endswith("no step:") for line in report.stdout.splitlines())


@pytest.mark.parametrize("one_tier", [Tier.MINUTES, Tier.GONE], indirect=True)
def test_newest_placement_is_shown_though_no_step_is_kept(one_tier: Path, tmp_path: Path) -> None:
    write(tmp_path / "whole", steps=64, step_ms=1000)
    exact = json.loads(cli("placement", "--json", tmp_path / "whole").stdout)
    found = cli("placement", "--json", one_tier)
    assert (found.returncode, found.stderr) == (0, "")
    shown, layers = json.loads(found.stdout)["layers"], exact["layers"]
    assert [layer["ranks"] for layer in shown] == [layer["ranks"] for layer in layers]
    assert [layer["since"] for layer in shown] == [layer["since"] for layer in layers]


@pytest.mark.parametrize("one_tier", [Tier.RANKS], indirect=True)
def test_report_without_experts_loads_is_of_steps_and_says_why_it_has_no_charts(
    one_tier: Path, tmp_path: Path
) -> None:
    written = cli("report", one_tier, "-o", tmp_path / "report.html", "--json")
    assert (written.returncode, json.loads(written.stdout)["tier"]) == (0, "steps")
    document = report_document(open_run(one_tier)).document
    assert document["summary"]["tier"] == "steps"
    assert document["loads"] is None
    assert any(note.startswith("Left out of the charts: ") for note in document["notes"])
    assert document["searched"] is None  # in all steps


@pytest.mark.parametrize("one_tier", [Tier.GONE], indirect=True)
def test_error_about_steps_that_are_gone_says_what_next(one_tier: Path) -> None:
    for command in ("experts", "summary"):
        error = cli(command, one_tier)
        assert error.returncode == 2
        assert "nothing is kept (budget); select other steps; `runs` shows of which" in error.stderr


@pytest.mark.parametrize("one_tier", [Tier.RANKS, Tier.MINUTES, Tier.GONE], indirect=True)
def test_loads_that_are_not_kept_are_not_exported(one_tier: Path, tmp_path: Path) -> None:
    for arguments in ([], ["--steps", "0-63"]):
        error = cli("export", "loads", "--as", "csv", "-o", tmp_path / "loads.csv", *arguments, one_tier)
        assert error.returncode == 2
        assert "retired: steps 0-63" in error.stderr
        assert not (tmp_path / "loads.csv").exists()


@pytest.mark.parametrize("one_tier", [Tier.RANKS, Tier.MINUTES], indirect=True)
def test_rearrangements_are_known_while_sums_per_minute_are_kept(one_tier: Path) -> None:
    for arguments, expected in (([], [20]), (["--steps", "10-40"], [20]), (["--steps", "30-40"], [])):
        found = cli("rearrangements", "--json", *arguments, one_tier)
        assert (found.returncode, found.stderr) == (0, "")
        assert [one["first_step"] for one in json.loads(found.stdout)["rearrangements"]] == expected


@pytest.mark.parametrize("one_tier", [Tier.GONE], indirect=True)
def test_rearrangements_of_steps_that_are_gone_are_not_known(one_tier: Path) -> None:
    shown = " ".join(cli("rearrangements", one_tier).stdout.split())
    assert "of steps 0-63 only the last placements are kept" in shown
    assert "never changed" not in shown


def test_runs_kept_in_full_have_no_column_for_it(tmp_path: Path) -> None:
    write(tmp_path / "dump", steps=16)
    assert "kept" not in cli("runs", tmp_path / "dump").stdout
