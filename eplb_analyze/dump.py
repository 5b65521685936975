"""Finding what lies in a dump's folder: runs, models, ranks, sessions, and the files in them.

Only folders and files of the format's own names are looked at, and no symbolic link is followed.
Figures are not made here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from eplb_analyze.errors import DumpError, Finding
from eplb_analyze.segments import (
    Manifest,
    OpenSegment,
    ParquetSegment,
    Segment,
    read_manifest,
    require_regular,
)
from eplb_dump.format import (
    JOURNAL_PATTERN,
    MANIFEST_FILE,
    MODEL_PREFIX,
    RANK_PREFIX,
    RUN_PREFIX,
    SEGMENT_PATTERN,
    SESSION_FILE,
    SESSION_PREFIX,
    FormatError,
    SessionInfo,
    load_json,
    rank_folder,
)
from eplb_dump.journal import JournalSegment, UnbegunJournal

_LEVELS = (RUN_PREFIX, MODEL_PREFIX, RANK_PREFIX, SESSION_PREFIX)
#: session.json is a few kB; a larger one is not read into memory.
_MAX_SESSION_FILE = 16 << 20


@dataclass
class Session:
    """One life of one writer: its metadata and its readable segments, in order."""

    folder: Path
    info: SessionInfo
    segments: list[Segment] = field(default_factory=list)
    #: Those whose steps turned out to be unreadable; their placements may be readable.
    lost: list[Segment] = field(default_factory=list)
    #: The writer's final accounting; None where it was not closed (killed, or still writing).
    closed: dict[str, object] | None = None
    #: Journals that are not sealed.
    journals: int = 0

    @property
    def last_step(self) -> int:
        return max((s.last_step for s in self.segments), default=-1)


@dataclass
class Discovery:
    """All sessions under a folder, by run and model, and what was odd about its files."""

    root: Path
    #: ``{run_id: {model slug: [SessionInfo and folder]}}``; no segment is opened yet.
    runs: dict[str, dict[str, list[tuple[Path, SessionInfo]]]]
    findings: dict[tuple[str, str], list[Finding]]

    def created(self, run_id: str) -> int:
        """When a run began, in ns since 1970: its oldest session."""
        infos = [info for sessions in self.runs[run_id].values() for _, info in sessions]
        return min((info.created_unix_ns for info in infos), default=-1)

    def newest_first(self) -> list[str]:
        return sorted(self.runs, key=lambda run_id: (self.created(run_id), run_id), reverse=True)


def discover(path: Path) -> Discovery:
    """Look through a dump, or one run, model, rank or session folder of it.

    Raises DumpError where there is no such folder, or no run in it.
    """
    if not path.exists():
        raise DumpError(f"{path}: no such folder")
    if not path.is_dir():
        raise DumpError(f"{path}: it is a file; give the folder that holds run=…")
    wanted: list[str] = []
    root = Path(os.path.abspath(path))
    while root.name.startswith(_LEVELS):
        wanted.insert(0, root.name)
        root = root.parent
    shown = path if not wanted else root
    found = Discovery(shown, {}, {})
    for names, folder in _descend(shown, wanted, found):
        run_id, model = names[0][len(RUN_PREFIX) :], names[1][len(MODEL_PREFIX) :]
        sessions = found.runs.setdefault(run_id, {}).setdefault(model, [])
        findings = found.findings.setdefault((run_id, model), [])
        try:
            sessions.append((folder, read_info(folder, names)))
        except FormatError as error:
            findings.append(
                Finding("error", "damaged_file", f"{folder / SESSION_FILE}: {error}; session skipped")
            )
        except OSError as error:
            text = f"{folder / SESSION_FILE}: {error.strerror}; session skipped"
            findings.append(Finding("error", "damaged_file", text))
    if not found.runs:
        raise DumpError(
            f"{path}: no run in it (no run=…/model=…/rank=…/session=… folder); "
            "was EXPERT_LOAD_DUMP_DIR set for the engine, and did it take a step?"
        )
    return found


def _descend(root: Path, wanted: list[str], found: Discovery) -> Iterator[tuple[list[str], Path]]:
    """``(folder names, session folder)`` of all sessions below ``root``."""

    def walk(folder: Path, names: list[str]) -> Iterator[tuple[list[str], Path]]:
        level = len(names)
        if level == len(_LEVELS):
            yield names, folder
            return
        for entry in _entries(folder):
            if not entry.name.startswith(_LEVELS[level]) or wanted[level : level + 1] not in (
                [],
                [entry.name],
            ):
                continue
            if entry.is_symlink():
                run_id = (names[0] if names else entry.name)[len(RUN_PREFIX) :]
                text = f"{entry.path}: a symbolic link, which is not followed"
                found.findings.setdefault((run_id, ""), []).append(Finding("warning", "symlink", text))
            elif entry.is_dir(follow_symlinks=False):
                yield from walk(folder / entry.name, [*names, entry.name])

    yield from walk(root, [])


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda e: e.name)
    except OSError as error:
        raise DumpError(f"{folder}: {error.strerror}") from None


def read_info(folder: Path, names: list[str]) -> SessionInfo:
    """What a session's folder says of itself; ``names`` are its four levels. Raises FormatError, OSError."""
    path = folder / SESSION_FILE
    require_regular(path)
    if path.stat().st_size > _MAX_SESSION_FILE:
        raise FormatError(f"it is larger than {_MAX_SESSION_FILE >> 20} MiB")
    info = SessionInfo.from_dict(load_json(path.read_bytes()))
    expected = [f"{RUN_PREFIX}{info.run_id}", rank_folder(info.ep_rank), f"{SESSION_PREFIX}{info.session_id}"]
    if [names[0], names[2], names[3]] != expected:
        raise FormatError("it belongs to another folder (was a session moved or renamed?)")
    return info


def open_session(folder: Path, info: SessionInfo, findings: list[Finding]) -> Session:
    """List a session's segments as of now, sealed and open; faults go to ``findings``."""
    session = Session(folder, info)
    journals: dict[int, Path] = {}
    sealed_names: set[str] = set()
    for entry in _entries(folder):
        journal, segment = JOURNAL_PATTERN.fullmatch(entry.name), SEGMENT_PATTERN.fullmatch(entry.name)
        if entry.is_symlink():
            text = f"{entry.path}: a symbolic link, which is not followed"
            findings.append(Finding("error", "symlink", text))
        elif journal:
            journals[int(journal[1])] = folder / entry.name
        elif segment:
            sealed_names.add(entry.name)
        elif entry.name not in (SESSION_FILE, MANIFEST_FILE) and not entry.name.endswith(".tmp"):
            text = f"{entry.path}: not a file of the format; ignored"
            findings.append(Finding("warning", "foreign_file", text))
    try:
        manifest = read_manifest(folder, info)
    except (OSError, FormatError) as error:
        manifest = Manifest({}, None, (isinstance(error, OSError) and error.strerror) or str(error))
    if manifest.fault is not None:
        text = f"{folder / MANIFEST_FILE}: {manifest.fault}; segments it lists after that are skipped"
        findings.append(Finding("error", "damaged_file", text))
    session.closed = manifest.closed
    for path in journals.values():
        try:
            require_regular(path)
            opened = JournalSegment(path)
        except FileNotFoundError:
            # Sealed since the folder was listed: look once more, at the new state.
            findings[:] = [f for f in findings if str(folder) not in f.text]
            return open_session(folder, info, findings)
        except UnbegunJournal as error:
            findings.append(Finding("info", "torn_journal", f"{path}: {error}"))
            continue
        except (FormatError, OSError) as error:
            findings.append(Finding("error", "damaged_file", f"{path}: {error}; skipped"))
            continue
        session.journals += 1
        session.segments.append(OpenSegment(opened))
        if opened.tail.fault is not None:
            lost = opened.tail.size - opened.tail.end
            if opened.tail.fault == "torn":
                text = f"{path}: its last {lost} bytes are an unfinished write; all before them was read"
                findings.append(Finding("info", "torn_journal", text))
            else:
                text = f"{path}: damaged from byte {opened.tail.end} on; {lost} bytes skipped"
                findings.append(Finding("error", "damaged_file", text))
    for seq, listed in manifest.entries.items():
        if seq not in journals:
            session.segments.append(ParquetSegment(folder, info, listed))
        sealed_names -= {file.name for file in listed.files.values()}
    for name in sorted(sealed_names):
        if int(name.split("-")[1].split(".")[0]) not in journals:
            text = f"{folder / name}: the session's manifest does not list it; skipped"
            findings.append(Finding("error", "unlisted_file", text))
    session.segments.sort(key=lambda s: (s.first_step, s.seq))
    return session
