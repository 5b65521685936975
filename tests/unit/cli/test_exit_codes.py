"""Exit codes: 0 done, 1 a check or threshold failed, 2 wrong usage, 3 the dump is unusable or incomplete."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import cli, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exit")
    write(folder / "good", steps=24)
    shutil.copytree(folder / "good", folder / "damaged")
    next((folder / "damaged").rglob("loads-000001.parquet")).unlink()
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("summary good", 0),
        ("check good", 0),
        ("advise --policy static --fail-below 0.01 good", 0),
        ("postmortem --fail-below 0.01 good", 0),
        ("check damaged", 1),
        ("advise --policy static --fail-below 1 good", 1),
        ("postmortem --fail-below 1 good", 1),
        ("summary --nonsense good", 2),
        ("summary --steps 500- good", 2),
        ("summary --run nothing good", 2),
        ("layer 77 good", 2),
        ("replay --policy nothing good", 2),
        ("nonsense", 2),
        ("summary", 2),
        ("summary empty", 3),
        ("summary gone", 3),
        ("summary damaged", 3),
        ("experts damaged", 3),
        ("postmortem empty", 3),
    ],
)
def test_exit_code_says_what_happened(
    command: str, code: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    result = cli(*command.split())
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert code < 2 or result.stderr or command.startswith("postmortem")
