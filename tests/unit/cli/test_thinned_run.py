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
        assert "per minute" in said or command == "report"
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
