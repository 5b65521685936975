"""Which run and which of its models are meant, if a dump has several."""

from __future__ import annotations

from dataclasses import dataclass

from eplb_analyze.errors import DumpError, Finding, NotInDumpError
from eplb_analyze.sessions.discovery import Discovery, discover
from eplb_analyze.sessions.starts import run_and_start
from eplb_analyze.storage.path import StoragePath
from eplb_dump.format.schema import model_slug
from eplb_dump.format.session import SessionInfo


@dataclass(frozen=True)
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
        raise DumpError(f"{path}: nothing readable in run {run}: {first}")
    names = {slug: infos[0][1].model for slug, infos in models.items()}
    if model is None:
        slug = max(models, key=lambda s: (max(_size(info) for _, info in models[s]), s))
        if len(models) > 1:
            others = ", ".join(name for s, name in names.items() if s != slug)
            notes.append(
                f"the run has other models, too: {others}; this is {names[slug]} (choose with --model)"
            )
    else:
        matches = [s for s, name in names.items() if model in (name, s, model_slug(name))]
        if not matches:
            raise NotInDumpError(
                f"{path}: run {run} has no model {model!r}; there are: {', '.join(names.values())}"
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
    """The id of the run asked for, or of the newest run, and notes for the user. Raises NotInDumpError."""
    run_ids = found.newest_first()
    starts = [] if run is None else found.starts_of(run)
    if starts:
        note = f"{len(starts)} engine starts were given the run id {run}; this is the newest, {starts[0]}"
        return starts[0], [f"{note} (choose with --run)"]
    if run is not None and run not in found.runs:
        raise NotInDumpError(f"{path}: no run {run!r}; there are: {', '.join(run_ids[:10])}")
    if run is not None or len(run_ids) == 1:
        return run or run_ids[0], []
    return run_ids[0], [
        f"{len(run_ids)} runs in {path}; this is the newest, {run_ids[0]} (choose with --run)"
    ]


def _size(info: SessionInfo) -> int:
    return (info.num_moe_layers or 0) * (info.num_physical_experts or info.num_logical_experts)
