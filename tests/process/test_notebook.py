"""The notebook: all its cells run, and say what the stored copy says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples/incident.ipynb"


def outputs(path: Path) -> list[list[tuple[str, str]]]:
    """What each cell of code shows: kind and text; of a picture only that it is one."""
    found = []
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            shown = []
            for output in cell["outputs"]:
                assert output["output_type"] != "error"
                for kind, text in {**output.get("data", {}), "text": output.get("text", "")}.items():
                    if text:
                        shown.append((kind, "" if kind == "image/png" else "".join(text)))
            found.append(shown)
    return found


def test_the_notebook_runs_and_shows_what_is_stored(tmp_path: Path) -> None:
    for package in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "scripts.notebook", str(tmp_path / "run.ipynb")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    assert outputs(tmp_path / "run.ipynb") == outputs(NOTEBOOK)


def test_the_stored_notebook_answers_and_names_nothing_of_a_machine() -> None:
    shown = [kind for cell in outputs(NOTEBOOK) for kind, _ in cell]
    assert shown.count("image/png") >= 1
    assert shown.count("text/html") >= 3
    text = NOTEBOOK.read_text()
    assert "expert 77 rose from" in text
    assert not re.search(r"/(home|root|tmp|usr|Users)/", text)


def cells(kind: str) -> list[Any]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_it_is_short() -> None:
    assert len(cells("code")) <= 10
    assert all(len("".join(cell["source"]).splitlines()) <= 20 for cell in cells("code"))
