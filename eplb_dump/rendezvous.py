"""How the ranks of one engine start agree on a run without communicating.

The safe way is to give all of them one ``run_id``, or EXPERT_LOAD_DUMP_RUN_ID in their environment.
Without it they use the dump folder: a rank joins the newest run if that run is young, has the same
shape and launch (the launcher's variables; on one host also the parent process) and does not have
this rank yet. Otherwise it creates the next run. Both claims are single ``mkdir`` calls, which are
atomic on local and network file systems.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from eplb_dump.format.schema import (
    MODEL_PREFIX,
    RANK_PREFIX,
    RUN_PREFIX,
    SESSION_FILE,
    SESSION_PREFIX,
    FormatError,
    Scope,
    model_slug,
    rank_folder,
)
from eplb_dump.format.session import SessionInfo, load_json

RUN_ID_VARIABLE = "EXPERT_LOAD_DUMP_RUN_ID"
#: A rank that starts later than this after the first one creates a new run.
JOIN_WINDOW_SECONDS = 600.0
#: Launchers set these to the same value for all ranks of one start.
_LAUNCH_VARIABLES = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "RAY_JOB_ID", "MASTER_ADDR", "MASTER_PORT")


def launch_of(environment: Mapping[str, str]) -> dict[str, str]:
    """What identifies an engine start: the launcher's variables and the parent process."""
    launch = {name: environment[name] for name in _LAUNCH_VARIABLES if name in environment}
    return {**launch, "parent": f"{socket.gethostname()}:{os.getppid()}"}


def claim_run(root: Path, info: SessionInfo) -> str:
    """Claim a rank's place in the newest run that it can join, or in a new one. Raises OSError."""
    root.mkdir(parents=True, exist_ok=True)
    slug = f"{MODEL_PREFIX}{model_slug(info.model)}"
    for _ in range(1000):
        runs = root.glob(f"{RUN_PREFIX}[0-9]*")
        numbers = [int(p.name[len(RUN_PREFIX) :]) for p in runs if _is_numbered(p)]
        newest = max(numbers, default=0)
        if newest and _joinable(root / f"{RUN_PREFIX}{newest:06d}", slug, info):
            folder = root / f"{RUN_PREFIX}{newest:06d}" / slug
            with contextlib.suppress(FileExistsError):
                folder.mkdir(exist_ok=True)
                (folder / rank_folder(info.ep_rank)).mkdir()
                return f"{newest:06d}"
        # Another rank may create it first; then the next round finds it.
        with contextlib.suppress(FileExistsError):
            (root / f"{RUN_PREFIX}{newest + 1:06d}").mkdir()
    raise FileExistsError(f"no run could be claimed in {root}")


def _is_numbered(path: Path) -> bool:
    name = path.name[len(RUN_PREFIX) :]
    # Not a given run_id that only looks like a number.
    return name.isascii() and name.isdigit() and name == f"{int(name):06d}" and path.is_dir()


def _joinable(run: Path, slug: str, own: SessionInfo) -> bool:
    """Whether a run is young, of the same launch and, if the same model is in it, of the same shape."""
    oldest = time.time_ns()
    for info, folder in _sessions(run):
        oldest = min(oldest, info.created_unix_ns)
        if _other_launch(info.launch, own.launch) or (folder == slug and _shape(info) != _shape(own)):
            return False
    return time.time_ns() - oldest <= JOIN_WINDOW_SECONDS * 1e9


def _shape(info: SessionInfo) -> tuple[int, Scope, int]:
    return info.ep_size, info.scope, info.num_logical_experts


def _other_launch(one: dict[str, str], other: dict[str, str]) -> bool:
    """Whether two processes belong to different starts. On one host, those of one start share a parent."""
    host, other_host = (launch.get("parent", "").rpartition(":")[0] for launch in (one, other))
    names = set(one) | set(other)
    if host != other_host:
        names.discard("parent")
    return any(one.get(name) != other.get(name) for name in names)


def _sessions(run: Path) -> Iterator[tuple[SessionInfo, str]]:
    for path in run.glob(f"{MODEL_PREFIX}*/{RANK_PREFIX}*/{SESSION_PREFIX}*/{SESSION_FILE}"):
        with contextlib.suppress(OSError, FormatError):
            yield SessionInfo.from_dict(load_json(path.read_bytes())), path.parents[2].name


def environment_run_id() -> str | None:
    return os.environ.get(RUN_ID_VARIABLE) or None
