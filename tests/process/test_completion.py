"""`eplb-analyze --install-completion` in real shells on a terminal, as a user types it."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import write


def session(shell: str, home: Path, *lines: str) -> None:
    """Type lines into a shell that someone with this home folder has just opened."""
    terminal, theirs = pty.openpty()
    variables = {
        "HOME": str(home), "TERM": "vt100", "LANG": "C.UTF-8",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }  # fmt: skip
    with subprocess.Popen(
        [shell, "-i"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=variables,
        cwd=home,
        start_new_session=True,
    ) as process:
        hangs = threading.Timer(60, process.kill)
        hangs.start()
        os.close(theirs)
        os.write(terminal, "".join(f"{line}\r" for line in (*lines, "exit")).encode())
        try:
            while os.read(terminal, 4096):
                pass
        except OSError:  # how Linux reports that the shell is gone
            pass
        finally:
            os.close(terminal)
            hangs.cancel()


@pytest.mark.parametrize(
    ("shell", "settings", "tab"),
    [("bash", ".bashrc", "\t"), ("zsh", ".zshrc", "\t\t")],  # zsh's first Tab only loads Typer's script
    ids=["bash", "zsh"],
)
def test_tab_completes_once_completion_is_installed(
    shell: str, settings: str, tab: str, tmp_path: Path
) -> None:
    if not shutil.which(shell):
        pytest.skip(f"no {shell}; `apt-get install {shell}`")
    (tmp_path / settings).write_text("# the user's own\n")
    write(tmp_path / "recording", steps=4)
    command = f"eplb-analyze sum{tab}--help >help.txt 2>&1"
    folder = "eplb-analyze check --json reco\t >check.json"
    session(shell, tmp_path, command)
    assert "No such command" in (tmp_path / "help.txt").read_text()
    session(shell, tmp_path, "eplb-analyze --install-completion >install.txt 2>&1")
    assert f"{shell} completion installed" in (tmp_path / "install.txt").read_text()
    assert (tmp_path / settings).read_text().startswith("# the user's own\n")
    session(shell, tmp_path, command, folder)
    assert "Usage: eplb-analyze summary" in (tmp_path / "help.txt").read_text()
    assert json.loads((tmp_path / "check.json").read_text())["findings"] == []
