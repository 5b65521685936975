"""Carries out what was planned: thins sessions, removes runs, in a folder or a bucket.

A kill at any moment leaves each session as it was, thinned, or thinned with files that nobody lists, which
the next `prune` removes. A run to be removed first gets a name that no reader looks at.
"""

from __future__ import annotations

import errno
import io
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from eplb_analyze.atomic import TEMPORARY, clear, hold, remove_held, remove_leftovers, scratch_folder
from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.sessions.discovery import REMOVED_RUNS_FILE
from eplb_analyze.sessions.minutes import added_up
from eplb_analyze.sessions.parquet_segment import ParquetSegment
from eplb_analyze.sessions.segments import DamagedSegmentError, read_manifest
from eplb_analyze.storage import path as places
from eplb_analyze.storage.bucket import Remote
from eplb_analyze.storage.path import StoragePath
from eplb_analyze.transfer.retention.survey import (
    Piece,
    SurveyedRun,
    SurveyedSession,
    survey_run,
)
from eplb_dump.format.files import discard, fsync_folder, remove, rename
from eplb_dump.format.journal import lock
from eplb_dump.format.manifest import Manifest, SealedSegment
from eplb_dump.format.minutes import Minutes
from eplb_dump.format.retention import (
    MERGED_AT_ONCE,
    TIERS,
    Thinning,
    forget_minutes,
    leftovers,
    next_thinning,
    thin_together,
)
from eplb_dump.format.schema import (
    MANIFEST_FILE,
    MODEL_PREFIX,
    RUN_PREFIX,
    SESSION_FILE,
    FormatError,
    Tier,
)

#: The folder, or object, that tells other prunes that one is at work.
AT_WORK = ".prune.eplb.tmp"
#: The mark of a prune in a bucket counts for so long after it was written.
_MARK_NS = 600 * 10**9
#: What reading a damaged file fails with: Arrow's errors have no number.
_DAMAGE: tuple[int | None, ...] = (None, errno.EIO, errno.ENOENT)
#: So many segments are thinned before their old files are removed: a full disk has no room for more.
_AT_ONCE = 32


class ChangedError(Exception):
    """A session is not as it was surveyed; the text says what differs."""


@contextmanager
def at_work(dump: StoragePath) -> Iterator[Callable[[], None]]:
    """Exclude other prunes of a dump, while what it yields is called now and then.

    Raises UsageError if there is one, OSError, UnreachableError.
    """
    if isinstance(dump, Path):
        with ExitStack() as held:
            taken = hold(dump / AT_WORK, held)
            if taken is False:
                raise UsageError(f"{dump}: another `prune` is running there; try again when it ends")
            clear(dump / AT_WORK)
            remove_leftovers(dump)
            if taken is None:
                _remove_graves(dump)
            try:
                yield lambda: None
            finally:
                with suppress(OSError):
                    remove_held(dump / AT_WORK)
        return
    mark = cast(Remote, dump / AT_WORK)
    places.forget_listing(dump)
    with suppress(FileNotFoundError):
        age = time.time_ns() - mark.stat().st_mtime_ns
        if age < _MARK_NS:
            raise UsageError(
                f"{dump}: another `prune` is running there, or was interrupted less than ten minutes ago: "
                f"{mark.name} is {age // 10**9} s old; try again when it is gone or older"
            )
    written = [time.monotonic()]
    mark.write(io.BytesIO(b"prune"))

    def stay() -> None:
        if time.monotonic() - written[0] > _MARK_NS / 10**9 / 10:
            mark.write(io.BytesIO(b"prune"))
            written[0] = time.monotonic()

    try:
        yield stay
    finally:
        _delete(mark)


def _remove_graves(dump: Path) -> None:
    """Remove what killed prunes left of runs. Without locks, nothing else tells that it is abandoned."""
    for grave in dump.glob(f".{RUN_PREFIX}*{TEMPORARY}"):
        if not grave.is_symlink() and any(grave.glob(f"*/{MODEL_PREFIX}*")):
            with suppress(OSError):
                remove_held(grave)


def _delete(path: StoragePath) -> None:
    """Delete an object."""
    cast(Remote, path).unlink()


# ---- thinning


def thin_session(session: SurveyedSession, moves: Mapping[Piece, Tier]) -> dict[Piece, str]:
    """Bring segments of a session to coarser tiers, and merge neighboring roll-ups.

    Returns the segments that stay as they are because they are damaged, and why.

    Raises ChangedError, OSError, FormatError; what was thinned before stays thinned.
    """
    assert session.info is not None
    with ExitStack() as held:
        exclude_others(session, held)
        manifest = read_manifest(session.folder, session.info)
        if manifest.fault is not None:
            raise FormatError(f"{session.folder / MANIFEST_FILE}: {manifest.fault}")
        for piece in moves:
            now = manifest.entries.get(piece.entry.seq)
            if now is None or now.files != piece.entry.files or now.tier is not piece.entry.tier:
                raise ChangedError("its segments have changed since `prune` looked at them")
        work = _Local(session) if isinstance(session.folder, Path) else _InBucket(session)
        work.thin(manifest, {piece.entry.seq: tier for piece, tier in moves.items()})
        return {piece: work.damaged[piece.entry.seq] for piece in moves if piece.entry.seq in work.damaged}


def exclude_others(session: SurveyedSession, held: ExitStack) -> None:
    """See that no writer has come, and hold the locks of journals, so that `recover` waits its turn."""
    if not isinstance(session.folder, Path):
        return
    names = {name for name in os.listdir(session.folder) if name.startswith("journal-")}
    if names - session.files.keys():
        raise ChangedError("its writer has begun another segment")
    for name in sorted(names):
        try:
            file = held.enter_context((session.folder / name).open("r+b"))
        except FileNotFoundError:
            raise ChangedError("its journal has just been sealed") from None
        if lock(file.fileno()) is False:
            raise ChangedError("its journal is in use")


def batches(entries: Sequence[SealedSegment], tiers: Mapping[int, Tier]) -> list[Thinning]:
    """Thinnings that bring entries to their tiers: what follows each other becomes one file where it can."""
    found: list[Thinning] = []
    group: list[SealedSegment] = []

    def joins(entry: SealedSegment) -> bool:
        last, tier = group[-1], tiers[entry.seq]
        if tiers[last.seq] is not tier or last.last_seq + 1 != entry.seq:
            return False
        if tier is Tier.GONE:
            return True
        whole = all("minutes" in e.files and e.times is not None for e in (last, entry))
        return tier is Tier.MINUTES and whole and last.shape == entry.shape and len(group) < MERGED_AT_ONCE

    for entry in [*sorted((e for e in entries if e.seq in tiers), key=lambda e: e.seq), None]:
        if group and (entry is None or not joins(entry)):
            found.append(Thinning(tuple(e.seq for e in group), tiers[group[0].seq], "prune"))
            group = []
        if entry is not None:
            group.append(entry)
    # What frees most for what it writes comes first: the disk may be full.
    return sorted(found, key=lambda t: -TIERS.index(t.tier))


def _merges(manifest: Manifest) -> list[Thinning]:
    """The next merge of neighboring roll-ups, if there is one."""
    merge = next_thinning(manifest.entries.values())
    return [] if merge is None else [Thinning(merge.seqs, merge.tier, "prune")]


class _Local:
    """Thins a session in its folder."""

    def __init__(self, session: SurveyedSession) -> None:
        assert session.info is not None
        self.session, self.info = session, session.info
        self.folder: Path = Path(str(session.folder))
        #: Why segments stay as they are, by their numbers.
        self.damaged: dict[int, str] = {}
        #: The bytes of the manifest as it was read or written; None in a scratch folder.
        self.size: int | None = None
        #: Rows of ``minutes`` that are to take the place of others, by the number of their segment.
        self.cut: dict[int, Minutes] = {}

    def thin(self, manifest: Manifest, tiers: Mapping[int, Tier]) -> None:
        if self.folder == self.session.folder:
            self.size = self.session.files[MANIFEST_FILE].st_size
        self.align(manifest, [seq for seq, tier in tiers.items() if tier is not Tier.GONE])
        todo = batches([*manifest.entries.values()], tiers)
        for at in range(0, len(todo), _AT_ONCE):
            self.together(manifest, todo[at : at + _AT_ONCE])
        while not self.damaged and (some := _merges(manifest)):
            self.together(manifest, some)

    def align(self, manifest: Manifest, seqs: Sequence[int]) -> None:
        """Replace rows of ``minutes`` that reach across a cut, while the loads are there.

        Once the new rows are made, the manifest lists these segments without any, until they are thinned: at
        each moment they have their loads, or the rows that are kept.
        """
        for seq in seqs:
            entry = manifest.entries[seq]
            if "minutes" in entry.files and self.session.cuts_in(entry):
                # Of damaged loads, the rows that are there are all that is left.
                with suppress(DamagedSegmentError, FormatError):
                    self.cut[seq] = self.made_of(self.session.folder, entry)
        if self.cut:
            self.remove(forget_minutes(self.folder, self.info, manifest, self.cut, self.size))

    def rolled_up(self, entry: SealedSegment) -> Minutes:
        """The rows of ``minutes`` of a segment that has none. Raises DamagedSegmentError, FormatError."""
        made = self.cut.get(entry.seq)
        return self.made_of(self.folder, entry) if made is None else made

    def made_of(self, folder: StoragePath, entry: SealedSegment) -> Minutes:
        return added_up(ParquetSegment(folder, self.info, entry), self.info, self.session.cuts)

    def together(self, manifest: Manifest, thinnings: Sequence[Thinning]) -> None:
        """Thin together, or without what is damaged. Raises OSError."""
        try:
            self.thin_now(manifest, thinnings)
        except (FormatError, DamagedSegmentError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _DAMAGE:
                raise
            if len(thinnings) == 1 == len(thinnings[0].seqs):
                number = thinnings[0].seqs[0]
                self.damaged[number] = f"segment {number} of it is damaged: {str(error).splitlines()[0]}"
                return
            for thinning in thinnings:
                for seq in thinning.seqs if len(thinnings) == 1 else [None]:
                    one = thinning if seq is None else Thinning((seq,), thinning.tier, thinning.reason)
                    self.together(manifest, [one])

    def thin_now(self, manifest: Manifest, thinnings: Sequence[Thinning]) -> None:
        self.remove(self.write(manifest, thinnings))

    def write(self, manifest: Manifest, thinnings: Sequence[Thinning]) -> list[str]:
        """Write what is kept; returns the names of superseded files."""
        return thin_together(
            self.folder, self.info, manifest, thinnings, self.rolled_up, self.size, self.session.cuts
        )

    def remove(self, superseded: Sequence[str]) -> None:
        """Remove files that the new manifest does not list."""
        if self.size is not None:
            self.size = (self.folder / MANIFEST_FILE).stat().st_size
        if superseded:
            remove(*(self.folder / name for name in superseded))


class _InBucket(_Local):
    """Thins a session in a scratch folder: new objects come first, then the manifest, then old ones go."""

    def thin(self, manifest: Manifest, tiers: Mapping[int, Tier]) -> None:
        with scratch_folder() as scratch:
            self.folder = scratch / "session"
            self.folder.mkdir()
            super().thin(manifest, tiers)

    def thin_now(self, manifest: Manifest, thinnings: Sequence[Thinning]) -> None:
        remote = cast(Remote, self.session.folder)
        fetched = set()
        for thinning in thinnings:
            entries = [manifest.entries[seq] for seq in thinning.seqs]
            for entry in entries:
                for table in _needed(entry, thinning, made=entry.seq in self.cut):
                    name = entry.files[table].name
                    (self.folder / name).write_bytes((remote / name).read_bytes())
                    fetched.add(name)
        superseded = self.write(manifest, thinnings)
        made = {path.name for path in self.folder.iterdir()} - fetched - {MANIFEST_FILE}
        for name in sorted(made):
            with (self.folder / name).open("rb") as file:
                (remote / name).write(file)
        self.remove(superseded)
        discard(self.folder.iterdir())

    def remove(self, superseded: Sequence[str]) -> None:
        remote = cast(Remote, self.session.folder)
        with (self.folder / MANIFEST_FILE).open("rb") as file:
            (remote / MANIFEST_FILE).write(file)
        for name in superseded:
            _delete(remote / name)


def _needed(entry: SealedSegment, thinning: Thinning, *, made: bool) -> set[str]:
    """The tables of an entry that a thinning reads; ``made``: its rows of ``minutes`` are made already."""
    wanted: set[str] = set()
    if thinning.tier is Tier.RANKS:
        wanted |= {"loads"}
    from_steps = "minutes" not in entry.files and not made
    if thinning.tier is not Tier.GONE and from_steps and len(thinning.seqs) == 1:
        wanted |= {"steps", "loads", "placements"}
    if entry.times is None:
        wanted |= {"steps"}
    if len(thinning.seqs) > 1:
        wanted |= {"placements"} | ({"minutes"} if thinning.tier is Tier.MINUTES else set())
    return wanted & entry.files.keys()


def leftovers_of(session: SurveyedSession) -> list[str]:
    """Files of a session that a killed prune left."""
    if session.live is not None or session.fault is not None or session.info is None:
        return []
    return leftovers(session.manifest, session.files, [int(name[8:-7]) for name in session.journals])


def remove_files(folder: StoragePath, names: Sequence[str]) -> None:
    """Remove files of one session for good. Raises OSError, UnreachableError."""
    if isinstance(folder, Path):
        with suppress(FileNotFoundError):
            remove(*(folder / name for name in names))
        return
    for name in names:
        _delete(folder / name)


# ---- removing


def remove_run(dump: StoragePath, run: SurveyedRun) -> None:
    """Remove a run with all its files and folders.

    Raises ChangedError if it is not as it was surveyed, OSError, UnreachableError.
    """
    if not isinstance(run.folder, Path):
        _remove_objects(run)
        return
    assert isinstance(dump, Path)
    with ExitStack() as held:
        require_unchanged(run, survey_run(run.folder))
        for session in run.sessions:
            exclude_others(session, held)
        grave = dump / f".{run.folder.name}{TEMPORARY}"
        if hold(grave, held) is False:
            raise ChangedError("another process is creating or removing it")
        target = grave / secrets.token_hex(4)
        rename(run.folder, target)
        fsync_folder(dump)
        try:
            require_unchanged(run, survey_run(target))
        except ChangedError:
            if not os.path.lexists(run.folder):
                rename(target, run.folder)
                fsync_folder(dump)
            raise
        remove_held(grave)
        fsync_folder(dump)


def require_unchanged(run: SurveyedRun, now: SurveyedRun) -> None:
    """Raise ChangedError unless a run has the same files as before, maybe elsewhere."""
    before, after = (
        sorted((s.folder.name, name, stat.st_size) for s in one.sessions for name, stat in s.files.items())
        for one in (run, now)
    )
    if (before, len(run.claims), len(run.foreign)) == (after, len(now.claims), len(now.foreign)):
        return
    raise ChangedError("its files have changed since `prune` looked at them")


def _remove_objects(run: SurveyedRun) -> None:
    """Remove a run's objects. While some are left, each manifest lists files that are missing."""
    last = (MANIFEST_FILE, SESSION_FILE)
    for wanted in (lambda name: name not in last, MANIFEST_FILE.__eq__, SESSION_FILE.__eq__):
        for session in run.sessions:
            remove_files(session.folder, [name for name in sorted(session.files) if wanted(name)])
    for claim in run.claims:
        _delete(claim)
    cast(Remote, run.folder).remove_empty_folder()


def log_removed(dump: StoragePath, lines: Sequence[Mapping[str, Any]]) -> None:
    """Append lines to the dump's log of removed runs, each once. Raises OSError, UnreachableError."""
    path = dump / REMOVED_RUNS_FILE
    before = b""
    with suppress(FileNotFoundError):
        before = path.read_bytes()
    keys = {_key(line) for line in before.decode(errors="replace").splitlines()}
    new = [text for line in lines if _key(text := json.dumps(dict(line))) not in keys]
    if not new:
        return
    added = "".join(f"{line}\n" for line in new).encode()
    if before and not before.endswith(b"\n"):  # a full disk cut the last line off
        added = b"\n" + added
    if isinstance(path, Path):
        if path.is_symlink():
            raise DumpError(f"{path}: it is a symbolic link, which is not followed; remove it")
        with path.open("ab") as file:
            file.write(added)
            file.flush()
            os.fsync(file.fileno())
        fsync_folder(path.parent)
    else:
        cast(Remote, path).write(io.BytesIO(before + added))


def _key(line: str) -> tuple[Any, ...]:
    with suppress(ValueError, AttributeError):
        document = json.loads(line)
        return tuple(document.get(name) for name in ("run", "first_time", "last_time"))
    return (line,)
