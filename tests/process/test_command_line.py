"""The installed program as a process: every command in each output form, streams, signals, permissions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from command_lines import ARGUMENTS
from helpers import ROOT, cli_process, one_error, start_child, write
from typer.main import get_command

from eplb_analyze.cli.app import program

PROGRAM = Path(sys.executable).with_name("eplb-analyze")


def commands(command: click.Command | None = None, name: str = "") -> list[str]:
    """The names of all commands, with those of their groups: ``export placement``."""
    group = getattr(command or get_command(program()), "commands", None)
    if group is None:
        return [name]
    return [found for key, below in group.items() for found in commands(below, f"{name} {key}".strip())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    write(folder / "dump", steps=24)
    np.save(folder / "loads.npy", np.arange(80, dtype=np.int64).reshape(10, 2, 4))
    return folder


@pytest.fixture
def dump(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(folder / "dump", tmp_path / "dump")


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("command", commands())
def test_every_command_works_as_a_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, form: str
) -> None:
    monkeypatch.chdir(folder)
    arguments = f"{command} {ARGUMENTS[command].format(form=form)}".split() + ["--json"] * (form == "json")
    result = cli_process(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    if form == "json":
        assert isinstance(json.loads(result.stdout), dict)
    else:
        assert result.stdout.strip()


def test_no_arguments_are_left_over() -> None:
    assert set(ARGUMENTS) == set(commands())


def test_a_closed_pipe_ends_the_program_silently(folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [str(PROGRAM), "summary", str(folder / "dump")]
    try:
        result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (-signal.SIGPIPE, b"")


@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-"])
def test_program_works_without_a_closed_stream(dump: Path, closed: str) -> None:
    next(dump.glob("run=*/model=*/rank=*0/session=*/loads-000001.parquet")).unlink()
    line = f"{PROGRAM} summary --json {dump} {closed}"
    result = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 3
    if closed == "2>&-":
        json.loads(result.stdout)
    else:
        assert result.stdout == ""
    assert ("loads-000001.parquet: it is missing" in result.stderr) == (closed == ">&-")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="as on macOS")
def test_output_that_cannot_be_written_is_an_error(folder: Path, tmp_path: Path) -> None:
    for streams, code, message in (
        (">/dev/full", 3, "eplb-analyze: error: No space left on device\n"),
        (">/dev/null 2>/dev/full", 3, ""),
    ):
        root = folder / "dump" if message else tmp_path
        for buffering in ({}, {"PYTHONUNBUFFERED": "1"}):
            variables = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
            result = subprocess.run(
                ["sh", "-c", f"{PROGRAM} summary {root} {streams}"],
                capture_output=True, text=True, check=False, env=variables | buffering,
            )  # fmt: skip
            assert (result.returncode, result.stderr) == (code, message)


@pytest.mark.parametrize("command", [["summary"], ["layer", "1"], ["check"]], ids=lambda words: words[0])
def test_run_that_is_still_being_written_is_read(command: list[str], tmp_path: Path) -> None:
    script = """
    import sys
    sys.path.insert(0, sys.argv[2])
    import numpy as np
    from eplb_dump import ExpertLoadWriter
    writer = ExpertLoadWriter(sys.argv[1], model="m", num_logical_experts=4, ep_size=2, scope="global")
    for _ in range(10):
        writer.record(None, np.full((2, 4), 5), np.arange(4) + np.zeros((2, 1), int))
    assert writer.flush()
    print("ready", flush=True)
    sys.stdin.read()
    """
    with start_child(script, tmp_path, ROOT) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        result = cli_process(*command, tmp_path)
        child.communicate("", timeout=30)
    assert result.returncode == 0
    messages = (result.stdout if command == ["check"] else result.stderr).replace("\n    ", " ")
    assert "not closed (killed, or still being written): rank 0" in messages
    assert "10" in result.stdout


def test_folder_without_permission_is_named(dump: Path) -> None:
    rank = next(dump.glob("run=*/model=*/rank=*1"))
    rank.chmod(0)
    try:
        result = without_privileges("summary", dump)
        assert result.returncode == 3
        assert f"{rank}: Permission denied; skipped" in result.stderr
        assert "estimate from 1 of 2 ranks" in result.stdout
        # If a run cannot be opened, nobody knows whether it is the newest.
        rank.parent.chmod(0)
        one_error(without_privileges("summary", dump), 3, f"{rank.parent}: Permission denied")
    finally:
        rank.parent.chmod(0o755)
        rank.chmod(0o755)


def without_privileges(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the program so that folder permissions apply even to root."""
    drop = "-dac_override,-dac_read_search"
    setpriv = ["setpriv", "--bounding-set", drop, "--inh-caps", drop]
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root may read everything, and setpriv is not there")
    line = [*(setpriv if os.geteuid() == 0 else []), str(PROGRAM), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_terminated_program_shows_the_cursor_again(name: str) -> None:
    script = """
        import os, signal, sys, time
        os.dup2(int(sys.argv[2]), 2)
        signal.signal(getattr(signal, sys.argv[1]), signal.SIG_DFL)  # nohup ignores it
        os.environ["TERM"] = "xterm"
        from eplb_analyze.cli import progress
        progress.DELAY_SECONDS = 0.0
        progress.Progress()(1, 2)
        # Any thread may receive the signal, which would not end a long sleep of the main thread.
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
        while True:
            time.sleep(0.01)
    """
    terminal, child_side = os.openpty()
    with start_child(script, name, child_side, pass_fds=(child_side,)) as child:
        try:
            code = child.wait(60)
        finally:
            child.kill()
    os.close(child_side)
    drawn = os.read(terminal, 1 << 16)
    os.close(terminal)
    assert code == 128 + getattr(signal, name)
    assert drawn.rfind(b"\x1b[?25h") > drawn.rfind(b"\x1b[?25l") > -1
