"""Which run and which of its models are meant, if a dump has several."""

from __future__ import annotations

import difflib

from eplb_analyze.errors import DumpError, Finding, NotInDumpError
from eplb_analyze.sessions.discovery import Discovery, discover
from eplb_analyze.sessions.starts import run_and_start
from eplb_analyze.storage.path import StoragePath, full_text
from eplb_analyze.text import command_line, listed
from eplb_dump.format.frozen import frozen
from eplb_dump.format.schema import model_slug
from eplb_dump.format.session import SessionInfo

#: So many runs are named in an error.
MAX_CANDIDATES = 10


@frozen
class Choice:
    """The sessions of one model of one run, before any is opened."""

    #: Folder and metadata, oldest first.
    sessions: list[tuple[StoragePath, SessionInfo]]
    findings: list[Finding]
    notes: list[str]
    #: The run's id, with the number of the start if several starts were given it.
    run_id: str
    #: Why its sessions are of several starts that cannot be separated; None if they are of one.
    mixed: str | None
    #: Sessions under the same run id that are of other starts.
    others: list[StoragePath]


def choose(path: StoragePath, run: str | None = None, model: str | None = None) -> Choice:
    """Find the run and model that :func:`~eplb_analyze.reader.run.open_run` opens. Raises as it does."""
    found = discover(path, run)
    run, notes = choose_run(found, path, run)
    models = {slug: infos for slug, infos in found.runs[run].items() if infos}
    findings = [f for (r, slug), fs in found.findings.items() if r == run for f in fs if slug not in models]
    if not models:
        first = findings[0].text if findings else "it has no session"
        raise DumpError(f"{path}: nothing in run {run} can be read: {first}")
    names = {slug: infos[0][1].model for slug, infos in models.items()}
    if model is None:
        slug = max(models, key=lambda s: (max(_size(info) for _, info in models[s]), s))
        if len(models) > 1:
            others = ", ".join(name for s, name in names.items() if s != slug)
            notes.append(
                f"the run has several models; using {names[slug]}. The others are {others}; choose one "
                f"with --model"
            )
    else:
        matches = [s for s, name in names.items() if model in (name, s, model_slug(name))]
        if not matches:
            raise NotInDumpError(
                f"{path}: run {run} has no model {model!r}; its models are: {', '.join(names.values())}"
            )
        slug = matches[0]
    findings += found.findings.get((run, slug), [])
    infos = sorted(models[slug], key=lambda item: (item[1].created_unix_ns, item[1].session_id))
    mixed = found.mixed.get(run)
    starts = [start for start in found.starts_of(run_and_start(run)[0]) if start != run]
    return Choice(
        infos,
        findings,
        notes,
        run,
        None if mixed is None else f"{path}: {mixed}",
        [folder for start in starts for folder, _ in found.sessions(start)],
    )


def choose_run(found: Discovery, path: StoragePath, run: str | None) -> tuple[str, list[str]]:
    """The id of the run asked for, or of the newest run, and notes for the user.

    Args:
        run: its id, or a beginning of the id that no other run has; None for the newest run.

    Raises:
        NotInDumpError: no run or several are meant.
    """
    run_ids = found.newest_first()
    if run is None:
        if len(run_ids) == 1:
            return run_ids[0], []
        note = f"{path} has {len(run_ids)} runs; using the newest, {run_ids[0]}. Choose another with --run"
        return run_ids[0], [f"{note}; `{_runs(path)}` lists them"]
    if run in found.runs:
        return run, []
    starts = found.starts_of(run)
    if starts:
        note = f"{len(starts)} engine starts share the run id {run}; using the newest, {starts[0]}"
        return starts[0], [f"{note}. Choose another with --run"]
    matches = [run_id for run_id in run_ids if run_id.startswith(run)]
    if not matches:
        alike = [i for i in run_ids if run in i] or difflib.get_close_matches(run, run_ids, 1)
        hint = f"did you mean {alike[0]}" if alike else f"its runs are: {listed(run_ids, MAX_CANDIDATES)}"
        raise NotInDumpError(
            f"{path}: no run {run!r}; {hint}{'?' if alike else ';'} `{_runs(path)}` lists all"
        )
    ids = list(dict.fromkeys(run_and_start(run_id)[0] for run_id in matches))
    if len(ids) > 1:
        raise NotInDumpError(
            f"{path}: several run ids begin with {run!r}: {listed(ids, MAX_CANDIDATES)}; write more of the id"
        )
    return choose_run(found, path, ids[0])


def _runs(path: StoragePath) -> str:
    return command_line("runs", full_text(path))


def _size(info: SessionInfo) -> int:
    return (info.num_moe_layers or 0) * (info.num_physical_experts or info.num_logical_experts)
