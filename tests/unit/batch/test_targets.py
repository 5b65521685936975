"""Which runs `postmortem` finds below folders, globs and links."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from batches import EVEN, postmortem, record
from helpers import cli

from eplb_analyze.batch.rows import Row
from eplb_analyze.batch.targets import find
from eplb_analyze.storage import path as storage


def test_run_named_several_times_counts_once(tmp_path: Path) -> None:
    record(tmp_path / "x/one", "r", EVEN)
    record(tmp_path / "x/two", "s", EVEN)
    out = cli(
        "postmortem",
        tmp_path,
        tmp_path / "x",
        f"{tmp_path}/x/one/",
        tmp_path / "x/*",
        tmp_path / "x/two/run=s",
    )
    assert out.stdout.startswith("2 runs · 2 complete\n")


def test_folders_and_globs_are_searched_without_following_links(tmp_path: Path) -> None:
    record(tmp_path / "x/one", "r", EVEN)
    record(tmp_path / "x/two", "r", EVEN)
    (tmp_path / "link").symlink_to(tmp_path / "x")
    assert len(postmortem(tmp_path / "x/*")["runs"]) == 2
    assert len(postmortem(tmp_path / "x/one/run=r")["runs"]) == 1
    # A symbolic link in a folder is not followed; one that is named is.
    assert len(postmortem(tmp_path)["runs"]) == 2
    for place, words in ((tmp_path / "none", "no such folder"), (tmp_path / "n*", "no folder matches")):
        out = cli("postmortem", place)
        assert out.returncode == 3
        assert words in out.stdout.replace("\n", " ")


def test_existing_name_is_not_a_glob(tmp_path: Path) -> None:
    record(tmp_path / "a[1]", "this", EVEN)
    record(tmp_path / "a1", "other", EVEN)
    assert [row["run_id"] for row in postmortem(tmp_path / "a[1]")["runs"]] == ["this"]


def test_what_cannot_be_read_has_a_broken_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path / "/".join("abcdefghijkl") / "dump", "deep", EVEN)
    record(tmp_path / "sub", "hidden", EVEN)
    record(tmp_path / "dump", "good", EVEN)
    (tmp_path / "dump/run=empty").mkdir()
    (tmp_path / "dump/run=no-rank/model=m").mkdir(parents=True)
    # An unrelated folder whose name looks like that of a run.
    record(tmp_path / "dump/run=exp7/inner", "inside", EVEN)
    entries = storage.entries

    def refuse(folder: Any, only: str | None = None) -> Any:
        if str(folder).startswith(str(tmp_path / "sub")) or "run=no-rank" in str(folder):
            raise PermissionError(13, "Permission denied", str(folder))
        return entries(folder, only)

    monkeypatch.setattr(storage, "entries", refuse)
    found = list(find([str(tmp_path)]))
    runs = {item.run_id for item in found if not isinstance(item, Row)}
    assert runs == {"deep", "good", "inside"}
    reasons = {item.run_id: str(item.reason) for item in found if isinstance(item, Row)}
    assert set(reasons) == {"", "empty", "no-rank"}
    assert "Permission denied" in reasons[""]
    assert "Permission denied" in reasons["no-rank"]
    assert "no run in it" in reasons["empty"]


def test_session_being_created_is_not_damage(tmp_path: Path) -> None:
    """The writer creates the folder, then a temporary file, then renames that to session.json."""
    record(tmp_path, "r", EVEN)
    for begun in ("run=r/model=m/rank=00007/session=new", "run=s/model=m/rank=00000/session=new"):
        (tmp_path / begun).mkdir(parents=True)
        (tmp_path / begun / "session.json.tmp").write_text('{"form')
    for command in (["summary"], ["check"], ["postmortem"]):
        result = cli(*command, tmp_path)
        assert (result.returncode, result.stderr) == (0, ""), command
    # A session that holds a recording must have a session.json.
    (tmp_path / "run=r/model=m/rank=00007/session=new/journal-000000.frames").write_bytes(b"x")
    assert "session.json" in cli("check", tmp_path).stdout


def test_run_reached_by_a_link_counts_once(tmp_path: Path) -> None:
    record(tmp_path / "all/a", "r", EVEN)
    (tmp_path / "all/b").symlink_to(tmp_path / "all/a")
    assert len(postmortem(tmp_path / "all/a", tmp_path / "all/b")["runs"]) == 1
