"""Temporary folders while other processes clean up the folder they are in."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from eplb_analyze.atomic import LOCK, hold, remove_leftovers


@pytest.mark.parametrize("there_before", [True, False])
def test_folder_that_another_process_removes_meanwhile_is_made_again(
    there_before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may take the folder for abandoned until it is locked, also while it is being made."""
    folder = tmp_path / ".x.eplb.tmp"
    if there_before:
        folder.mkdir()
    made, removals = os.mkdir, [2]

    def mkdir_then_removed(path: str, *arguments: int, **options: int) -> None:
        try:
            made(path, *arguments, **options)
        finally:
            if removals[0]:
                removals[0] -= 1
                remove_leftovers(tmp_path)

    monkeypatch.setattr(os, "mkdir", mkdir_then_removed)
    with ExitStack() as held:
        assert hold(folder, held) is True
        assert (folder / LOCK).exists()
        remove_leftovers(tmp_path)
        assert (folder / LOCK).exists()


def test_file_in_the_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / ".x.eplb.tmp").touch()
    with ExitStack() as held, pytest.raises(FileExistsError):
        hold(tmp_path / ".x.eplb.tmp", held)
