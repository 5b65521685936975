"""Run scripts that use vLLM or SGLang, which live in an environment of their own.

The scripts are those of ``tests/engines``. Each runs in a process of its own, which is a fork of one that has
imported the engine already: see ``fork_server.py`` there.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

from helpers import ROOT, arrays, engines_python

from eplb_analyze import Run

SCRIPTS = ROOT / "tests/engines"


def run_in(
    engine: str, script: str, *arguments: object, packages: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script where ``engine`` ("vllm" or "sglang") is imported already.

    Of the variables EXPERT_LOAD..., it sees only those given here. ``packages`` is a folder whose packages
    come before those of the engines' environment.
    """
    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        return fork_server(engine, packages).run(
            [str(SCRIPTS / script), *map(str, arguments)], environment, Path(folder)
        )


@functools.cache
def version_of(engine: str) -> str:
    """The version in the engines' environment, such as ``0.33.0``, without what a build adds to it."""
    code = f"from importlib.metadata import version; print(version({engine!r}))"
    found = subprocess.run([engines_python(), "-c", code], capture_output=True, text=True, check=True).stdout
    return found.strip().partition("+")[0]


def serve(
    folder: Path, *options: str, packages: Path | None = None, **environment: str
) -> tuple[list[dict[str, Any]], Path, str]:
    """Serve with vLLM and the plugin; the truth of each rank, the dump, and what was printed."""
    dump = folder / "dump"
    variables = {"EXPERT_LOAD_DUMP_DIR": str(dump), **environment}
    done = run_in(
        "vllm", "vllm_ranks.py", "--out", folder / "truth", *options, packages=packages, **variables
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    ranks = sorted((folder / "truth").glob("rank*.npz"))
    return [arrays(path) for path in ranks], dump, done.stdout + done.stderr


def described(run: Run, rank: int) -> dict[int, tuple[str, int]]:
    """Phase ("" if unknown) and tokens (-1) of the steps for which a rank stated one of them."""
    found = {}
    for session in run.sessions:
        for segment in session.segments if session.info.ep_rank == rank else ():
            rows = segment.steps()
            for step, phase, tokens in zip(rows.step, rows.phase, rows.num_tokens, strict=True):
                if phase >= 0 or tokens >= 0:
                    found[int(step)] = (rows.phases[phase] if phase >= 0 else "", int(tokens))
    return found


class ForkServer:
    """The process that has imported an engine, and forks one for each script."""

    def __init__(self, engine: str, packages: Path | None = None) -> None:
        options = ["-W", "ignore"] if engine == "sglang" else []
        self._process = subprocess.Popen(
            [engines_python(), *options, str(SCRIPTS / "fork_server.py"), engine],
            env={
                **inherited(),
                **first_on_path(packages),
                "OPENBLAS_NUM_THREADS": "1",
                "OMP_NUM_THREADS": "1",  # a fork has one thread
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self._answer() == "ready"
        atexit.register(self.close)

    def run(
        self, arguments: list[str], environment: dict[str, str], folder: Path, timeout: float = 280
    ) -> subprocess.CompletedProcess[str]:
        """Run one script to its end; after ``timeout`` seconds, it and what it started are killed."""
        files = [folder / "output", folder / "errors"]
        job = {"arguments": arguments, "environment": {**inherited(), **environment}}
        assert self._process.stdin is not None
        print(json.dumps({**job, "output": str(files[0]), "errors": str(files[1])}), file=self._process.stdin)
        timer = threading.Timer(timeout, kill_group, [int(self._answer())])
        timer.start()
        try:
            code = int(self._answer())
        finally:
            timer.cancel()
        return subprocess.CompletedProcess(arguments, code, *(file.read_text() for file in files))

    def close(self) -> None:
        with self._process:  # closes its stdin, which ends it
            pass

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, "the engine's process has ended: its messages are above"
        return line


@functools.cache
def fork_server(engine: str, packages: Path | None) -> ForkServer:
    return ForkServer(engine, packages)


def first_on_path(packages: Path | None) -> dict[str, str]:
    if packages is None:
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))}


def inherited() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("EXPERT_LOAD")}


def kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
