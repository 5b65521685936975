"""Finds the runs, models, ranks and sessions in a dump, and opens the segments of sessions.

Only folders and files with names of the format are read, and no symbolic link is followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from eplb_analyze.errors import DumpError, Finding
from eplb_analyze.parallel import ordered_map
from eplb_analyze.sessions.metadata import find_info, rebuilt_manifest
from eplb_analyze.sessions.parquet_segment import ParquetSegment
from eplb_analyze.sessions.segments import (
    DamagedSegmentError,
    OpenSegment,
    Segment,
    exhausted,
    read_manifest,
    require_regular,
)
from eplb_analyze.sessions.starts import START_SEPARATOR, MixedStarts, Span, run_and_start, separate
from eplb_analyze.storage import path as places
from eplb_analyze.storage.path import StoragePath, requests_at_once
from eplb_analyze.text import listed, plural
from eplb_dump.format.journal import JournalSegment, UnbegunJournal
from eplb_dump.format.manifest import Manifest, SealedSegment
from eplb_dump.format.schema import (
    JOURNAL_PATTERN,
    LEVEL_PREFIXES,
    MANIFEST_FILE,
    MODEL_PREFIX,
    RUN_PREFIX,
    SEGMENT_PATTERN,
    SESSION_FILE,
    FormatError,
    Tier,
    model_slug,
)
from eplb_dump.format.session import SessionInfo

#: The tiers of segments that have no steps any more.
RETIRED = Tier.MINUTES, Tier.GONE
#: Where a dump keeps a line for each run that `prune` removed.
REMOVED_RUNS_FILE = "pruned.jsonl"
#: Why a folder may have no run.
NO_RUN = "was EXPERT_LOAD_DUMP_DIR set for the engine, and did it run a step?"
#: So many folders are searched for dumps, to name them in an error.
SEARCHED_FOLDERS = 200


@dataclass
class Session:
    """One life of one writer: its metadata and its readable segments, in order."""

    folder: StoragePath
    info: SessionInfo
    segments: list[Segment] = field(default_factory=list)
    #: Segments whose steps turned out to be damaged; their placements may be readable.
    lost: list[Segment] = field(default_factory=list)
    #: Segments whose steps were retired (tiers minutes and gone), in order; they can have placements, and
    #: sums per minute.
    retired: list[ParquetSegment] = field(default_factory=list)
    #: How often segments turned out to be thinned after they were opened.
    refreshed: int = 0
    #: The writer's final accounting; None if it was not closed (killed, or still writing).
    closed: dict[str, object] | None = None
    #: Number of journals that are not sealed.
    journals: int = 0
    #: First and last step that it is a copy of; None if it is not a partial copy.
    part: tuple[int, int] | None = None

    @property
    def thinned(self) -> list[SealedSegment]:
        """The manifest's entries of its retired segments."""
        return [segment.entry for segment in self.retired]

    @property
    def last_step(self) -> int:
        return max((s.last_step for s in self.segments), default=-1)


@dataclass
class Discovery:
    """All sessions under a folder, by run and model, and findings about its files."""

    root: StoragePath
    #: ``{run_id: {model slug: [SessionInfo and folder]}}``; no segment is opened yet.
    runs: dict[str, dict[str, list[tuple[StoragePath, SessionInfo]]]]
    findings: dict[tuple[str, str], list[Finding]]
    #: Sessions whose ``session.json`` cannot be read; their metadata was taken from other files.
    rebuilt: list[StoragePath] = field(default_factory=list)
    #: Runs with the sessions of several starts, which cannot be separated: by id, why.
    mixed: dict[str, str] = field(default_factory=dict)

    def starts_of(self, run_id: str) -> list[str]:
        """The ids of a run's starts, newest first, if several starts were given its id."""
        return [own for own in self.newest_first() if own != run_id and run_and_start(own)[0] == run_id]

    def created(self, run_id: str) -> int:
        """When a run began, by its oldest session, in ns since 1970."""
        infos = [info for sessions in self.runs[run_id].values() for _, info in sessions]
        return min((info.created_unix_ns for info in infos), default=-1)

    def findings_of(self, run_id: str) -> list[Finding]:
        """Findings about the files of a run, over all its models."""
        return [f for (run, _), findings in self.findings.items() if run == run_id for f in findings]

    def sessions(self, run_id: str, model: str | None = None) -> list[tuple[StoragePath, SessionInfo]]:
        """The sessions of a run, or of one of its models: a model's name or slug."""
        return [
            (folder, info)
            for slug, of_model in sorted(self.runs[run_id].items())
            for folder, info in of_model
            if model is None or model in (info.model, slug, model_slug(info.model))
        ]

    def newest_first(self) -> list[str]:
        return sorted(self.runs, key=lambda run_id: (self.created(run_id), run_id), reverse=True)


def _dumps_below(top: Path) -> list[Path]:
    """The dumps below a folder that is not a dump, the nearest first, as far as a short search finds them."""
    found: list[Path] = []
    waiting = [top]
    for _ in range(SEARCHED_FOLDERS):
        if not waiting:
            break
        folder = waiting.pop(0)
        try:
            inside = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
        except OSError:
            continue
        if any(name.startswith(RUN_PREFIX) for name in inside):
            found.append(folder)
        else:
            waiting += [folder / name for name in inside if not name.startswith(".")]
    return found


def discover(path: StoragePath, run: str | None = None) -> Discovery:
    """Find the sessions of a dump, or of one run, model, rank or session folder of it.

    If several engine starts were given one run id, each is a run, and has the id with its number: ``r@2``.
    If ``run`` is the id of an existing run, or the beginning of some, other runs may be left out.

    Raises DumpError if the folder does not exist or has no run.
    """
    if isinstance(path, Path):
        if not path.exists():
            raise DumpError(f"{path}: no such folder")
        if not path.is_dir():
            raise DumpError(f"{path}: it is a file; pass the folder that contains run=…")
    wanted: list[str] = []
    root = places.absolute(path)
    while root.name.startswith(LEVEL_PREFIXES):
        wanted.insert(0, root.name)
        root = root.parent
    shown = path if not wanted else root
    narrowed = not wanted and run is not None
    if run is not None and not wanted:
        wanted = [f"{RUN_PREFIX}{run_and_start(run)[0]}"]
    found = _find(shown, wanted)
    if not found.runs and narrowed:
        found = _find(shown, [], f"{RUN_PREFIX}{run}")
    if not found.runs and narrowed:
        return discover(path)
    if not found.runs and not isinstance(path, Path) and not path.is_dir():
        what = "it is an object; pass the prefix that contains run=…" if path.exists() else "nothing is there"
        raise DumpError(f"{path}: {what}")
    if not found.runs:
        odd = (finding.text for findings in found.findings.values() for finding in findings)
        raise no_run_in(path, next(odd, None))
    return found


def no_run_in(path: StoragePath, why: str | None = None) -> DumpError:
    """The error about a folder, or a prefix in a bucket, without any run; ``why``: if a file tells it."""
    below = _dumps_below(path) if isinstance(path, Path) else []
    with suppress(OSError):
        if why is None and (path / REMOVED_RUNS_FILE).exists():
            why = f"`prune` removed the runs that {REMOVED_RUNS_FILE} lists"
    if why is None:
        why = f"these folders in it are dumps: {listed(below, 3)}" if below else NO_RUN
    return DumpError(f"{path}: no run in it (no run=…/model=…/rank=…/session=… folder); {why}")


def discover_folder(dump: StoragePath, name: str) -> Discovery:
    """The runs in one folder ``run=…`` of a dump: none if its writers have only just begun.

    Raises DumpError if the folder cannot be listed.
    """
    return _find(dump, [name])


def _find(root: StoragePath, wanted: list[str], prefix: str = RUN_PREFIX) -> Discovery:
    """The sessions of a dump, in folders of these names by level; in runs whose folders have the prefix."""
    found = Discovery(root, {}, {})
    sessions = list(_descend(root, wanted, found, prefix))
    for (names, folder), session in ordered_map(find_info, sessions, requests_at_once(root)):
        if session.info is None and not session.fault:
            continue
        run_id, model = names[0][len(RUN_PREFIX) :], names[1][len(MODEL_PREFIX) :]
        readable = found.runs.setdefault(run_id, {}).setdefault(model, [])
        findings = found.findings.setdefault((run_id, model), [])
        path_and_fault = f"{folder / SESSION_FILE}: {session.fault}"
        if session.info is None:
            findings.append(Finding("error", "damaged_file", f"{path_and_fault}; session skipped"))
            continue
        readable.append((folder, session.info))
        if session.source:
            found.rebuilt.append(folder)
            text = (
                f"{path_and_fault}; its content was restored from {session.source} for this command; "
                f"`recover` rewrites it"
            )
            findings.append(Finding("warning", "session_rebuilt", text))
    for run_id in [*found.runs]:
        _separate_starts(found, run_id)
    return found


def _separate_starts(found: Discovery, run_id: str) -> None:
    """Replace a run by the engine starts that were given its id, if there are several."""
    spans: dict[StoragePath, Span | None] = {}

    def span_of(folder: StoragePath, info: SessionInfo) -> Span | None:
        if folder not in spans:
            spans[folder] = _span(open_session(folder, info, [], None))
        return spans[folder]

    starts = separate(found.sessions(run_id), span_of)
    if isinstance(starts, MixedStarts):
        found.mixed[run_id] = f"run {run_id}: {starts.reason}"
    elif len(starts) > 1:
        models = found.runs.pop(run_id)
        findings = {key: found.findings.pop(key) for key in [*found.findings] if key[0] == run_id}
        for number, sessions in enumerate(starts, 1):
            own_id = f"{run_id}{START_SEPARATOR}{number}"
            own = {folder for folder, _ in sessions}
            found.runs[own_id] = {
                slug: kept for slug, all_ in models.items() if (kept := [s for s in all_ if s[0] in own])
            }
            found.findings |= {(own_id, slug): [*some] for (_, slug), some in findings.items()}
            text = f"{len(starts)} engine starts share the run id {run_id}; this one is {own_id}, with "
            text += f"{plural(len(sessions), 'session')}; each of the others is shown as a separate run"
            warning = Finding("warning", "several_starts", text)
            found.findings.setdefault((own_id, ""), []).append(warning)


def _span(session: Session) -> Span | None:
    """When a session began and ended; None if it has no step that can be read."""
    kept = [segment for segment in session.segments if segment.last_step >= 0]
    segments: list[Segment] = sorted([*kept, *session.retired], key=lambda segment: segment.seq)
    try:
        (begin, begin_clock), (last, last_clock) = (_times(session, segments[i]) for i in (0, -1))
    except (IndexError, DamagedSegmentError):
        return None
    steps = begin[0], last[1]
    closed = (session.closed or {}).get("closed_unix_ns")
    end = max(steps[1], closed) if isinstance(closed, int) else steps[1]
    return Span(
        (segments[0].first_step, max(segment.last_step for segment in segments)),
        (session.info.created_unix_ns, end),
        steps,
        (begin_clock[0], last_clock[1]),
    )


def _times(session: Session, segment: Segment) -> tuple[tuple[int, int], tuple[int, int]]:
    """The least and the greatest time of a segment's steps, ns since 1970, and by the monotonic clock.

    Raises DamagedSegmentError.
    """
    if isinstance(segment, ParquetSegment) and segment.entry.tier in RETIRED:
        first, last = segment.entry.times or (session.info.created_unix_ns,) * 2
        offset = session.info.created_unix_ns - session.info.created_monotonic_ns
        return (first, last), (first - offset, last - offset)
    rows = segment.steps()
    return (
        (int(rows.time_ns.min()), int(rows.time_ns.max())),
        (int(rows.monotonic_ns.min()), int(rows.monotonic_ns.max())),
    )


def _descend(
    root: StoragePath, wanted: list[str], found: Discovery, prefix: str
) -> Iterator[tuple[list[str], StoragePath]]:
    """``(folder names, session folder)`` of all sessions in runs whose folders have the prefix."""

    def walk(folder: StoragePath, names: list[str]) -> Iterator[tuple[list[str], StoragePath]]:
        level = len(names)
        if level == len(LEVEL_PREFIXES):
            yield names, folder
            return
        try:
            inside = places.entries(folder, wanted[level] if level < len(wanted) else None)
        except OSError as error:
            if exhausted(error):
                raise
            text = f"{folder}: {error.strerror}"
            if level < 3:  # without this folder the run or model is unknown
                raise DumpError(text) from None
            finding = Finding("error", "damaged_file", f"{text}; skipped")
            found.findings.setdefault((names[0][len(RUN_PREFIX) :], ""), []).append(finding)
            return
        for entry in inside:
            if not entry.name.startswith(LEVEL_PREFIXES[level] if level else prefix):
                continue
            if entry.is_symlink():
                run_id = (names[0] if names else entry.name)[len(RUN_PREFIX) :]
                text = f"{entry.path}: a symbolic link, which is not followed"
                found.findings.setdefault((run_id, ""), []).append(Finding("warning", "symlink", text))
            elif entry.is_dir(follow_symlinks=False):
                yield from walk(folder / entry.name, [*names, entry.name])

    yield from walk(root, [])


def open_sessions(found: Sequence[tuple[StoragePath, SessionInfo]], findings: list[Finding]) -> list[Session]:
    """Open sessions, in this order, all as of one moment; see :func:`open_session`."""
    if not found:
        return []
    own: list[list[Finding]] = [[] for _ in found]
    # Reading many ranks' journals takes a while. If the run continues meanwhile, the ranks that are read
    # first would seem to have stopped.
    threads = requests_at_once(found[0][0])
    sizes = list(ordered_map(_sizes, [folder for folder, _ in found], threads))
    items = [(*session, mine, now) for session, mine, (_, now) in zip(found, own, sizes, strict=True)]
    sessions = [session for _, session in ordered_map(lambda item: open_session(*item), items, threads)]
    findings += [finding for mine in own for finding in mine]
    return sessions


def _sizes(folder: StoragePath) -> dict[str, int] | None:
    """The sizes of a session's journals by name, and the names of its sealed files with 0."""
    sizes: dict[str, int] = {}
    try:
        for entry in places.entries(folder):
            if JOURNAL_PATTERN.fullmatch(entry.name):
                sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
            elif SEGMENT_PATTERN.fullmatch(entry.name):
                sizes[entry.name] = 0
    except OSError:  # open_session lists it again and reports why
        return None
    return sizes


def _first_after(sizes: dict[str, int] | None, journals: dict[int, StoragePath]) -> int | None:
    """The number of the first segment that began after the files were listed; None if there is none."""
    if sizes is None:
        return None
    known = [_seq(name) for name in sizes]
    later = [seq for seq, path in journals.items() if path.name not in sizes]
    return min([*later, *([max(known) + 1] if known else [])], default=None)


def _seq(name: str) -> int:
    """The number of the segment, or of the last one, in the name of a journal or a sealed file."""
    return int(name.partition("-")[2].partition(".")[0].rpartition("-")[2])


def _manifest(folder: StoragePath, info: SessionInfo, sealed: set[int]) -> Manifest:
    """A session's manifest, read again while it does not list the segments in ``sealed`` yet."""
    for looks in reversed(range(3)):
        try:
            manifest = read_manifest(folder, info)
        except (OSError, FormatError) as error:
            if exhausted(error):
                raise
            return Manifest(fault=(isinstance(error, OSError) and error.strerror) or str(error))
        known = all(manifest.entry_of(seq) is not None for seq in sealed)
        if known or manifest.fault is not None or not looks:
            break
        places.forget_listing(folder)
    return manifest


def open_session(
    folder: StoragePath, info: SessionInfo, findings: list[Finding], sizes: dict[str, int] | None
) -> Session:
    """List a session's segments, sealed and open; faults go to ``findings``.

    Journals are read up to their ``sizes``, by name. Segments that began later are left out, even if
    they are sealed by now.
    """
    session = Session(folder, info)
    journals: dict[int, StoragePath] = {}
    sealed_names: set[str] = set()
    try:
        inside = places.entries(folder)
    except OSError as error:
        if exhausted(error):
            raise
        findings.append(Finding("error", "damaged_file", f"{folder}: {error.strerror}; session skipped"))
        return session
    for entry in inside:
        journal, segment = JOURNAL_PATTERN.fullmatch(entry.name), SEGMENT_PATTERN.fullmatch(entry.name)
        if entry.is_symlink():
            text = f"{entry.path}: a symbolic link, which is not followed"
            findings.append(Finding("error", "symlink", text))
        elif journal:
            journals[int(journal[1])] = folder / entry.name
        elif segment:
            sealed_names.add(entry.name)
        elif entry.name not in (SESSION_FILE, MANIFEST_FILE) and not entry.name.endswith(".tmp"):
            text = f"{entry.path}: not an eplb-dump file; ignored"
            findings.append(Finding("warning", "foreign_file", text))
    opened, gone, faults = _open_journals(journals, sizes)
    ended = [read.closed for read in opened.values() if read.closed is not None]
    end = _first_after(sizes, journals)
    manifest = _manifest(folder, info, set(gone))
    if sealed_names and all(entry.name != MANIFEST_FILE for entry in inside) and not manifest.entries:
        manifest = rebuilt_manifest(folder, info)
        text = f"{folder / MANIFEST_FILE}: it is missing; segments are read from their files; whether "
        text += "the writer was closed is unknown; `recover` rewrites it"
        findings.append(Finding("warning", "manifest_rebuilt", text))
    if manifest.fault is not None:
        text = f"{folder / MANIFEST_FILE}: {manifest.fault}; segments listed after that are skipped"
        findings.append(Finding("error", "damaged_file", text))
    session.closed, session.part = manifest.closed, manifest.part
    for seq, path in gone.items():
        if manifest.entry_of(seq) is None:
            text = f"{path}: the manifest lists it, but it is missing; skipped"
            findings.append(Finding("error", "damaged_file", text))
        del journals[seq]
    sealed_names -= {file.name for entry in manifest.entries.values() for file in entry.files.values()}
    leftovers = _leftovers(folder, manifest, sealed_names, journals)
    for seq in [seq for seq, path in journals.items() if path.name in leftovers]:
        del journals[seq]
        faults.pop(seq, None)
        if seq in opened:
            opened.pop(seq).close()
    sealed_names -= leftovers
    if leftovers:
        text = f"{folder}: {plural(len(leftovers), 'file')} of thinned segments, for example "
        text += f"{min(leftovers)}: a kill or a power cut left or brought back what was retired; ignored"
        findings.append(Finding("info", "leftover_files", f"{text}; `recover` removes it"))
    for seq, in_manifest in manifest.entries.items():
        names = [file.name for file in in_manifest.files.values()]
        sealed = ParquetSegment(folder, info, in_manifest)
        if in_manifest.tier in RETIRED:
            session.retired.append(sealed)
            continue
        # If its files do not exist, it is missing, not later.
        if end is not None and seq >= end and names and all((folder / n).exists() for n in names):
            session.closed = None  # which came even later
        elif seq not in journals or ((seq in opened or seq in faults) and sealed.supersedes(opened.get(seq))):
            # A partial copy has at most the placements of segments that it left out.
            (session.segments if sealed.step_rows else session.lost).append(sealed)
            if seq in journals:
                findings += _superseded(journals.pop(seq), opened.pop(seq, None), sealed)
                faults.pop(seq, None)
        elif seq in opened and len(opened[seq].steps.step) < sealed.step_rows and not opened[seq].limited:
            text = (
                f"{journals[seq]}: it has {len(opened[seq].steps.step)} of the {sealed.step_rows} steps that "
            )
            text += "the manifest lists, and the sealed files are damaged or missing"
            findings.append(Finding("error", "damaged_file", text))
    session.closed = session.closed or next(iter(ended), None)
    findings += faults.values()
    for seq, read in opened.items():
        session.journals += 1
        session.segments.append(OpenSegment(read, journals[seq]))
        findings += _tail_findings(read, journals[seq])
    for name in sorted(sealed_names):
        if _seq(name) not in journals or _seq(name) in faults:
            text = f"{folder / name}: the session's manifest does not list it; skipped"
            findings.append(Finding("error", "unlisted_file", text))
    session.segments.sort(key=lambda s: (s.first_step, s.seq))
    session.retired.sort(key=lambda s: s.seq)
    return session


def _leftovers(
    folder: StoragePath, manifest: Manifest, unlisted: set[str], journals: dict[int, StoragePath]
) -> set[str]:
    """The names of files that an interrupted thinning left, or a power cut brought back.

    They are of segments that the manifest lists, and it does not list them; journals if they are thinned.
    """
    # Few entries are of several segments; one listed under its own number needs no search.
    several = [entry for entry in manifest.entries.values() if entry.last_seq > entry.seq]

    def entry_of(seq: int) -> SealedSegment | None:
        own = manifest.entries.get(seq)
        return own or next((entry for entry in several if entry.seq < seq <= entry.last_seq), None)

    found = {name for name in unlisted if entry_of(_seq(name)) is not None}
    for seq, path in journals.items():
        entry = entry_of(seq)
        if entry is not None and entry.thinned is not None:
            found.add(path.name)
    return {name for name in found if (folder / name).exists()}  # not removed since they were listed


def refresh_thinned(session: Session) -> bool:
    """Replace a session's segments that its writer, or `prune`, has thinned since they were opened.

    Returns whether there was any. Raises nothing: a manifest that cannot be read changes nothing.
    """
    with suppress(OSError, FormatError):
        places.forget_listing(session.folder)
        manifest = read_manifest(session.folder, session.info)
        known = {segment.seq: segment for segment in session.segments if isinstance(segment, ParquetSegment)}
        known |= {segment.seq: segment for segment in session.retired}
        changed = [
            ParquetSegment(session.folder, session.info, entry)
            for entry in manifest.entries.values()
            if entry.thinned is not None and entry.seq in known
            if (entry.thinned, entry.files) != (known[entry.seq].entry.thinned, known[entry.seq].entry.files)
        ]
        if changed:
            _replace(session, changed)
            session.refreshed += 1
            return True
    return False


def _replace(session: Session, changed: Sequence[ParquetSegment]) -> None:
    def left(segment: Segment) -> bool:
        return not any(new.seq <= segment.seq <= new.last_seq for new in changed)

    session.segments, session.lost = [*filter(left, session.segments)], [*filter(left, session.lost)]
    session.retired = [*filter(left, session.retired)]
    for segment in changed:
        (session.retired if segment.entry.tier in RETIRED else session.segments).append(segment)
    session.segments.sort(key=lambda s: (s.first_step, s.seq))
    session.retired.sort(key=lambda s: s.seq)


def _open_journals(
    journals: dict[int, StoragePath], sizes: dict[str, int] | None
) -> tuple[dict[int, JournalSegment], dict[int, StoragePath], dict[int, Finding]]:
    """Open a session's journals up to their ``sizes``; those that have no size began later and are left out.

    Returns by their number those opened, those that are gone (sealed since the folder was listed: the
    manifest, which is read later, lists them), and why the others cannot be read.
    """
    opened: dict[int, JournalSegment] = {}
    gone: dict[int, StoragePath] = {}
    faults: dict[int, Finding] = {}
    for seq, path in sorted(journals.items()):
        if sizes is not None and path.name not in sizes:
            continue
        try:
            require_regular(path)
            opened[seq] = JournalSegment(path, None if sizes is None else sizes[path.name])
        except FileNotFoundError:
            gone[seq] = path
        except UnbegunJournal as error:
            faults[seq] = Finding("info", "torn_journal", f"{path}: {error}")
        except (FormatError, OSError) as error:
            if exhausted(error):
                raise
            faults[seq] = Finding("error", "damaged_file", f"{path}: {error}; skipped")
    return opened, gone, faults


def _tail_findings(journal: JournalSegment, path: StoragePath) -> Iterator[Finding]:
    """What lies behind the last readable frame of a journal."""
    lost = journal.tail.size - journal.tail.end
    if journal.tail.fault == "torn":
        text = f"{path}: its last {lost} bytes are an incomplete write; everything before them was read"
        yield Finding("info", "torn_journal", text)
    elif journal.tail.fault is not None:
        text = f"{path}: damaged from byte {journal.tail.end} on; {lost} bytes skipped"
        yield Finding("error", "damaged_file", text)


def _superseded(
    path: StoragePath, journal: JournalSegment | None, sealed: ParquetSegment
) -> Iterator[Finding]:
    """Close a journal that is not read, as its segment is sealed; report it unless it is equal."""
    steps = 0
    if journal is not None:
        steps = len(journal.steps.step)
        journal.close()
    if steps < sealed.step_rows:
        text = (
            f"{path}: it has {steps} of {sealed.step_rows} steps; the sealed segment has all of them and "
            f"is read instead"
        )
        yield Finding("info", "superseded_journal", text)
