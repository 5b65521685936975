"""The work of a command grows in proportion to the number of runs: counted, not timed."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from helpers import cli, write

from eplb_analyze import parallel
from eplb_dump.format.schema import SESSION_FILE
from eplb_dump.format.session import dump_json, load_json


@contextmanager
def counted_operations(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count the calls of each function of Python and C, comparisons among them, and entries of listings."""
    count: Counter[str] = Counter()
    scandir = os.scandir

    class Listing:
        def __init__(self, *where: Any) -> None:
            self._found = scandir(*where)

        def __iter__(self) -> Iterator[os.DirEntry[str]]:
            for entry in self._found:
                count["entry of a listing"] += 1
                yield entry

        def __enter__(self) -> Listing:
            return self

        def __exit__(self, *_: object) -> None:
            self._found.close()

    def called(frame: FrameType, event: str, function: Any) -> None:
        if event == "call":
            count[f"{frame.f_code.co_filename}: {frame.f_code.co_name}"] += 1
        elif event == "c_call":
            count[str(getattr(function, "__qualname__", function))] += 1

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", Listing)
        sys.setprofile(called)
        try:
            yield count
        finally:
            sys.setprofile(None)


@pytest.fixture(scope="module")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dump")
    write(root, ranks=1, ep_size=1, steps=4)
    return root


def add_runs(root: Path, one_run: Path, numbers: range, *, readable: bool) -> None:
    (run,) = one_run.iterdir()
    for number in numbers:
        copy = shutil.copytree(run, root / f"run=x{number:05d}")
        (session,) = copy.rglob(SESSION_FILE)
        info = load_json(session.read_bytes())
        session.unlink()
        if readable:
            session.write_bytes(dump_json({**info, "run_id": f"x{number:05d}"}))


COMMANDS = {
    "summary": ["summary", "DUMP"],
    "watch": ["watch", "--once", "DUMP"],
    "postmortem": ["postmortem", "DUMP"],
    "postmortem --save": ["postmortem", "--save", "kept", "--html", "DUMP"],
    "copy": ["copy", "DUMP", "copied"],
}


@pytest.mark.parametrize("readable", [True, False], ids=["runs", "runs-being-created"])
@pytest.mark.parametrize("command", COMMANDS)
def test_work_is_linear_in_the_number_of_runs(
    command: str, readable: bool, one_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(one_run, tmp_path / "dump")
    monkeypatch.chdir(tmp_path)
    # All work in this thread: only its calls are counted, and those that threads need depend on the load.
    monkeypatch.setattr(parallel, "_max_workers", 1)
    sizes = [8, 16, 32] if "--html" in COMMANDS[command] else [16, 32, 64]
    words = [str(root) if word == "DUMP" else word for word in COMMANDS[command]]
    cli(*words)  # imports
    counts = []
    done = 0
    for size in sizes:
        add_runs(root, one_run, range(done, size), readable=readable)
        done = size
        for made in ("kept", "copied"):
            shutil.rmtree(tmp_path / made, ignore_errors=True)
        gc.disable()  # hypothesis is called at each collection
        try:
            with counted_operations(monkeypatch) as count:
                result = cli(*words)
        finally:
            gc.enable()
        assert "Traceback" not in result.stderr
        counts.append(count)
    for operation in counts[2]:
        once, twice, again = (count[operation] for count in counts)
        # Twice as many runs are added the second time: linear work doubles, quadratic work is 4 times that.
        assert again - twice <= 2.5 * max(0, twice - once) + 3 * sizes[0], operation
