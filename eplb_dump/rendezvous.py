"""How the ranks of one engine start agree on a run without communicating.

The safe way is to give all of them one ``run_id``, or EXPERT_LOAD_DUMP_RUN_ID in their environment.
Without it they meet in the dump folder. Each rank claims its place in a run: a folder that holds
``claim.json``, the metadata of the claiming session, and that is renamed into place. A rename onto a folder
with content fails, so a run and a rank each have one owner, and a claim is never seen without its content.

A rank joins a run only if all who claimed a place in it are known to be of its own start. If that cannot be
known, it takes a run of its own: two runs of one start can be read, a run of two starts cannot.

Assumed: the file system renames atomically and shows a rename to all hosts (NFS does), and the ranks of one
start are all running before the first of them ends. All times that are compared are the file system's, so
clocks of hosts may differ.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from eplb_dump.format.frozen import frozen
from eplb_dump.format.manifest import Manifest
from eplb_dump.format.schema import (
    MANIFEST_FILE,
    MODEL_PREFIX,
    RANK_PREFIX,
    RUN_PREFIX,
    SESSION_PREFIX,
    FormatError,
    Scope,
    model_slug,
    rank_folder,
)
from eplb_dump.format.session import SessionInfo, dump_json, load_json
from eplb_dump.start import is_alive, own_age_ns

RUN_ID_VARIABLE = "EXPERT_LOAD_DUMP_RUN_ID"
CLAIM_FILE = "claim.json"
#: A process that was started later than this after a run's first claim does not belong to the run.
JOIN_WINDOW_SECONDS = 600.0
#: What a claim is prepared in; a rank that was killed meanwhile leaves it.
_DRAFT_PREFIX, _DRAFT_SUFFIX = "claim-", ".tmp"
_DRAFT_SECONDS = 3600.0
#: Each attempt but the last fails because another start claimed the next run.
_ATTEMPTS = 10_000
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


@frozen
class Member:
    """A rank that claimed a place in a run. Times are ns by the file system's clock."""

    info: SessionInfo
    claimed_ns: int
    #: The rank's folder.
    folder: Path
    #: Whether its process runs; None: it is on another machine.
    alive: bool | None = None
    #: When its session was closed in order; None: it was not, or the process runs.
    closed_ns: int | None = None


@frozen
class Claim:
    """A claimed run; ``doubt`` says why other ranks of this start may be in another run, if they may."""

    run_id: str
    doubt: str | None = None


def claim_run(root: Path, info: SessionInfo) -> Claim:
    """Claim a rank's place in the run of its engine start, or in a new run. Raises OSError."""
    root.mkdir(parents=True, exist_ok=True)
    slug, rank = f"{MODEL_PREFIX}{model_slug(info.model)}", rank_folder(info.ep_rank)
    draft = root / f"{_DRAFT_PREFIX}{secrets.token_hex(8)}{_DRAFT_SUFFIX}"
    claim = draft / slug / rank
    try:
        claim.mkdir(parents=True)
        (claim / CLAIM_FILE).write_bytes(dump_json(info.to_dict()))
        now_ns = _changed_ns(claim / CLAIM_FILE)
        search = _Search(root, info, now_ns - own_age_ns())
        for _ in range(_ATTEMPTS):
            number, doubt = search.run_to_join()
            if number is not None:
                if _rename(claim, root / _name(number) / slug / rank):
                    return Claim(f"{number:06d}")
                continue  # another process has claimed this rank: the run belongs to another start
            number = search.newest + 1
            if _rename(draft, root / _name(number)):
                _remove_old_drafts(root, now_ns)
                return Claim(f"{number:06d}", doubt)
            search.newest = number  # even if a listing that is cached does not show it yet
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    raise FileExistsError(errno.EEXIST, f"no run could be claimed in {_ATTEMPTS:,} attempts", str(root))


def judge(own: SessionInfo, spawned_ns: int, members: Sequence[Member]) -> bool | str:
    """Whether a process belongs to the start of a run's members; a text if it cannot be known, and why.

    Args:
        own: what the process would claim.
        spawned_ns: when it was started.
        members: at least one.
    """
    identity = own.start_identity
    same = [identity.same_as(member.info.start_identity) for member in members]
    if False in same or any(_excludes(member.info, own) for member in members):
        return False
    if identity.id is not None and None not in same:
        return True
    # An engine that was restarted by the same launcher looks the same but for the times of its processes.
    if spawned_ns > min(member.claimed_ns for member in members) + JOIN_WINDOW_SECONDS * 1e9:
        return False
    if None in same:
        return (
            "neither a common parent process nor a launcher variable shows whether they belong to the "
            "same start"
        )
    killed = [m for m in members if m.alive is False and m.closed_ns is None]
    if len(killed) == len(members) or any(m.claimed_ns <= spawned_ns for m in killed):
        return False  # also a process from a pool can have been started before the ranks that were killed
    if any(m.alive or max(m.claimed_ns, m.closed_ns or 0) > spawned_ns for m in members):
        return True  # they ran at the same time
    if any(m.alive is None and m.closed_ns is None for m in members):
        return "its ranks are on other machines and started before this process"
    return False


def _excludes(member: SessionInfo, own: SessionInfo) -> bool:
    """Whether a run with this member has no place for another: one of its rank, or of another shape."""
    if member.model != own.model:
        return False
    return member.ep_rank == own.ep_rank or _shape(member) != _shape(own)


def _shape(info: SessionInfo) -> tuple[int, Scope, int]:
    return info.ep_size, info.scope, info.num_logical_experts


class _Search:
    """Looks for the run of one process's start."""

    def __init__(self, root: Path, own: SessionInfo, spawned_ns: int) -> None:
        self._root, self._own, self._spawned_ns = root, own, spawned_ns
        #: Runs of other starts, which need not be read again.
        self._foreign: set[int] = set()
        #: The highest number that is known to be taken.
        self.newest = 0

    def run_to_join(self) -> tuple[int | None, str | None]:
        """The run of this start, if there is one; else what cannot be known about other runs, if anything."""
        joinable: dict[int, list[Member]] = {}
        doubt = None
        for number in self._recent_runs():
            members = self._members(number)
            verdict = judge(self._own, self._spawned_ns, members) if members else False
            if verdict is True:
                joinable[number] = members
            elif verdict is not False:
                doubt = f"cannot tell whether run {number:06d} belongs to this engine start: {verdict}"
        if len(joinable) > 1 and self._own.start_identity.id is None:
            # In one process, engines can follow each other without any trace but closed writers.
            still_open = {n: m for n, m in joinable.items() if any(map(_is_open, m))}
            if len(still_open) != 1:
                doubt = f"cannot tell which of runs {_listed(joinable)} belongs to this engine start: "
                return None, doubt + "one process started engines at the same time"
            joinable = still_open
        return max(joinable, default=None), doubt

    def _recent_runs(self) -> Iterator[int]:
        """The numbers of runs that the process can belong to by their time, newest first."""
        names = [entry.name[len(RUN_PREFIX) :] for entry in os.scandir(self._root) if _is_run(entry.name)]
        self.newest = max([self.newest, *map(int, names)])
        earliest = self._spawned_ns - JOIN_WINDOW_SECONDS * 1e9
        for number in sorted({self.newest, *map(int, names)}, reverse=True):
            if number in self._foreign:
                continue
            try:
                if _changed_ns(self._root / _name(number)) < earliest:
                    return  # runs are numbered as they are claimed, so all others are older
            except OSError:  # it was removed
                continue
            yield number

    def _members(self, number: int) -> list[Member]:
        """The members of a run; none if it belongs to another start, or they cannot be read."""
        members: list[Member] = []
        try:
            for path in (self._root / _name(number)).glob(f"{MODEL_PREFIX}*/{RANK_PREFIX}*/{CLAIM_FILE}"):
                info = SessionInfo.from_dict(load_json(path.read_bytes()))
                if self._own.start_identity.same_as(info.start_identity) is False:
                    self._foreign.add(number)
                    return []
                members.append(self._member(path, info))
        except (OSError, FormatError):
            return []
        return members

    def _member(self, path: Path, info: SessionInfo) -> Member:
        own, other = self._own.start, info.start
        claimed_ns = _changed_ns(path)
        alive = None
        if own is not None and other is not None and own.machine == other.machine:
            alive = is_alive(other.process)
        if alive or (alive is None and claimed_ns > self._spawned_ns):
            return Member(info, claimed_ns, path.parent, alive)
        return Member(info, claimed_ns, path.parent, alive, _closed_ns(path.parent, info))


def _is_open(member: Member) -> bool:
    return member.alive is not False and _closed_ns(member.folder, member.info) is None


def _closed_ns(rank: Path, info: SessionInfo) -> int | None:
    """When a session was closed in order, by the file system's clock; None if it was not."""
    path = rank / f"{SESSION_PREFIX}{info.session_id}" / MANIFEST_FILE
    try:
        with path.open("rb") as file:
            closed = Manifest.read(file, os.fstat(file.fileno()).st_size, info.session_id, path).closed
        return None if closed is None else _changed_ns(path)
    except OSError:
        return None


def _changed_ns(path: Path) -> int:
    """When a file or folder was last changed, by the file system's clock."""
    return path.stat().st_mtime_ns


def _rename(draft: Path, place: Path) -> bool:
    """Put a claim into its place. Returns False if the place is taken. Raises OSError."""
    try:
        if place.parent.name.startswith(MODEL_PREFIX):
            place.parent.mkdir(exist_ok=True)
        os.rename(draft, place)
    except OSError as error:
        if error.errno in _TAKEN or (isinstance(error, FileNotFoundError) and draft.exists()):
            return False  # or the run was removed
        raise
    return True


def _remove_old_drafts(root: Path, now_ns: int) -> None:
    """Remove what ranks left that were killed while they claimed a place."""
    for draft in root.glob(f"{_DRAFT_PREFIX}*{_DRAFT_SUFFIX}"):
        with contextlib.suppress(OSError):
            if now_ns - _changed_ns(draft) > _DRAFT_SECONDS * 1e9:
                shutil.rmtree(draft)


def _name(number: int) -> str:
    return f"{RUN_PREFIX}{number:06d}"


def _is_run(folder: str) -> bool:
    """Whether a folder has the name of a claimed run, and not of a given run id that only looks like it."""
    name = folder.removeprefix(RUN_PREFIX)
    digits = folder != name and name.isascii() and name.isdigit()
    return digits and folder == _name(int(name)) and int(name) > 0


def _listed(numbers: Iterable[int]) -> str:
    return " and ".join(f"{number:06d}" for number in sorted(numbers))


def environment_run_id() -> str | None:
    return os.environ.get(RUN_ID_VARIABLE) or None
