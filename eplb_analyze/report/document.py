"""The figures of a report as one JSON document: those of the other commands, as they give them, and loads.

The page shows these and computes nothing but sums of loads over the steps that its reader chooses, so it
cannot disagree with a terminal.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eplb_analyze.analysis.experts import ExpertReport, ExpertSums, expert_report_of, expert_sums
from eplb_analyze.analysis.findings import summary_findings
from eplb_analyze.analysis.ranks import RankSums, rank_report_of
from eplb_analyze.analysis.rearrangements import (
    RearrangementReport,
    RearrangementSums,
    rearrangement_report,
)
from eplb_analyze.analysis.summary import summarize, summary_of
from eplb_analyze.analysis.summary_report import Summary, incomplete
from eplb_analyze.analysis.summary_sums import RunSums, bins_of
from eplb_analyze.analysis.timeline import TimelineSums
from eplb_analyze.errors import DumpError, Finding
from eplb_analyze.json_report import as_json
from eplb_analyze.parallel import thread_pool
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.configurations import LastConfiguration
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.readings import Consumer, read_blocks
from eplb_analyze.reader.rolled_up import from_minutes
from eplb_analyze.reader.run import Run
from eplb_analyze.reader.run_info import imported
from eplb_analyze.report import answer, sentences
from eplb_analyze.report.bins import LoadBins, bins_that_fit
from eplb_analyze.text import clean
from eplb_dump.format import __version__
from eplb_dump.format.frozen import frozen
from eplb_dump.format.schema import model_slug

HIDDEN = "(hidden)"
#: Bits of an expert's flags, beside its verdict (0 never hot, 1 in bursts, 2 always).
FLAGS = ("under_replicated", "over_replicated", "replicas_on_one_rank", "cold", "dead")
VERDICTS = ("never", "bursts", "always")
#: Codes of findings whose texts name ranks, layers, steps and experts only, so that a redacted report can
#: show them. What is not listed may name a file, a host or a run, and is hidden.
NAMELESS = frozenset(
    {
        "missing_ranks",
        "several_global_writers",
        "no_steps",
        "no_complete_step",
        "incomplete_steps",
        "incomplete_end",
        "rank_stopped",
        "missing_steps",
        "dropped_steps",
        "rejected_steps",
        "not_closed",
        "placements_lost",
        "placement_conflict",
        "uneven_slots",
    }
)


@frozen
class ReportDocument:
    """The document, of which steps it is, and in how many bins of time."""

    document: dict[str, Any]
    steps: Completeness
    bins: int


def report_document(
    run: Run, steps: tuple[int, int] | None = None, *, top: int = 10, redact: bool = False
) -> ReportDocument:
    """All figures of a run, or of a half-open range of its steps.

    Args:
        top: how many rows of a ranking are shown at first.
        redact: leave out names of models, runs, hosts and files.

    Raises:
        NotInDumpError: no step of the run is in the range.
    """
    summary, changes, views, loads = run.retry_without_damaged(lambda: _analyzed(run, steps))
    searched = answer.searched(summary, run.clock)
    about: list[str | None] = [answer.source(summary, run.clock), searched]
    notes = [f"{note[0].upper()}{note[1:]}." for note in about if note is not None] + changes.notes
    figures: dict[str, Any] = {}
    packed: dict[str, Any] | None = None
    experts = None
    has_figures = summary.spreads["balancedness"].mean is not None or (
        summary.estimates and not summary.steps.count(StepState.RECORDED)
    )
    # The charts are about experts' loads, too.
    if has_figures and views is not None and views.bins.sums is None:
        notes += [f"{note[0].upper()}{note[1:]}." for note in run.retired_notes(steps, "the charts")]
    elif has_figures and views is not None:
        over_time, ranks = views.timeline.timeline(), rank_report_of(run, *views.ranks.result(steps))
        left_out = views.bins.result(steps)[2]
        experts = _experts(views.experts, steps)
        notes += [
            *over_time.notes,
            *ranks.notes,
            *left_out,
            *(sentences.expert_notes(experts) if experts else ()),
        ]
        figures = {
            "timeline": _figures(over_time.to_json()),
            "ranks": _figures(ranks.to_json()),
            "experts": None if experts is None else _expert_figures(run, experts),
        }
        packed = loads
    notes = list(dict.fromkeys(notes))
    findings = [f for f in summary_findings(run, summary.steps) if f.severity != "info"]
    findings += summary.contradictions
    said = {
        "title": run.info.model,
        "when": answer.when(summary, run.clock),
        "shape": answer.shape(run.info) if run.info.num_layers else None,
        "imported": imported(run.info.origin) if run.info.origin is not None else None,
        "answer": as_json(answer.answer_of(summary, run.clock)),
        "not_due": summary.not_due,
        "searched": searched,
        "words": sentences.sentences(summary, experts, changes, run.clock),
        "tokens": sentences.tokens(summary),
        "cost": sentences.cost(summary),
        "summary": summary.to_json(),
        "incomplete": incomplete(summary) if summary.steps.incomplete_share else None,
        "gaps": summary.steps.gaps[:10],
        "rearrangements": _figures(changes.to_json()),
        "timeline": None,
        "ranks": None,
        "experts": None,
        **figures,
        "findings": [vars(finding) for finding in findings],
        "notes": notes,
    }
    if redact:
        said |= {"title": "a model", "findings": [_redacted(finding) for finding in findings]}
        said["summary"]["run"] |= {"model": HIDDEN, "run_id": HIDDEN, "origin": None}
    document = {
        **_each_text(said, _hider(run) if redact else clean),
        "program": f"eplb-analyze {__version__}",
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "redacted": redact,
        "top": top,
        "meanings": sentences.meanings(bursts=experts is not None and sentences.tells_bursts(experts)),
        "loads": packed,
    }
    return ReportDocument(document, summary.steps, len(packed["steps"]) if packed else 0)


def _redacted(finding: Finding) -> dict[str, str]:
    return {**vars(finding), "text": finding.text if finding.code in NAMELESS else ""}


def _figures(document: dict[str, Any]) -> dict[str, Any]:
    """A command's document without the parts that the report shows only once."""
    return {key: value for key, value in document.items() if key not in ("run", "steps", "notes")}


class _Views:
    """What the page shows over time and by rank and expert, added block by block in order of steps."""

    def __init__(self, run: Run, steps: tuple[int, int] | None) -> None:
        self.timeline = TimelineSums(run, bins=bins_that_fit(run), steps=steps)
        edges, with_loads = self.timeline.edges, run.with_loads()
        self.bins = LastConfiguration(with_loads, lambda shape: LoadBins(run, shape, edges))
        self.experts = expert_sums(with_loads)
        self.ranks = LastConfiguration(run, lambda shape: RankSums(run, shape))

    @property
    def consumers(self) -> tuple[Consumer, ...]:
        return self.timeline, self.ranks, self.bins, self.experts


def _analyzed(
    run: Run, steps: tuple[int, int] | None
) -> tuple[Summary, RearrangementReport, _Views | None, dict[str, Any] | None]:
    """What the report shows of a run, in one pass over its steps, and its loads as the page has them.

    No views and no loads if it is from sums per minute.
    """
    if from_minutes(run, steps):
        summary = summarize(run, steps)
        # Rearrangements are judged where their steps are kept.
        return summary, rearrangement_report(run, cost=summary.cost if steps is None else None), None, None
    if steps is not None:
        run.require(steps)
    sums, changes = RunSums(run, bins_of(run, steps)), RearrangementSums(run, steps)
    views = None if run.step_range[0] is None else _Views(run, steps)
    read_blocks(run.keeping_loads(), steps, sums, changes, *(() if views is None else views.consumers))
    estimated = run.estimated(steps)
    if views is not None and estimated is not run:
        views = _Views(estimated, steps)
        read_blocks(estimated.keeping_loads(), steps, *views.consumers)
    with thread_pool(1) as beside:
        bins = None if views is None else views.bins.sums
        packed = beside.submit(lambda: None if bins is None else bins.packed(run))
        summary = summary_of(sums.sums, run, steps)
        judged = changes.report(summary.cost if steps is None else None)
        return summary, judged, views, packed.result()


def _experts(sums: LastConfiguration[ExpertSums], steps: tuple[int, int] | None) -> ExpertReport | None:
    """None if no placement is known, so that loads cannot be attributed to experts."""
    try:
        return expert_report_of(sums.run, None, *sums.result(steps))
    except DumpError:
        return None


def _expert_figures(run: Run, report: ExpertReport) -> dict[str, Any]:
    """Counts, drift, and of every layer and expert its verdict and flags; the page has the loads."""
    columns = report.columns
    code = np.select([columns["verdict"] == verdict for verdict in VERDICTS], range(len(VERDICTS)))
    for bit, flag in enumerate(FLAGS, start=2):
        code += columns[flag].astype(np.int64) << bit
    codes = np.zeros((run.info.num_layers, run.info.num_logical_experts), np.int64)
    row = {layer: i for i, layer in enumerate(run.info.layers)}
    codes[[row[layer] for layer in columns["layer"].tolist()], columns["logical"]] = code
    document = report.to_json(rows=False)
    kept = (
        "window",
        "windows",
        "hot_factor",
        "counts",
        "drift",
        "unknown_tokens",
        "layers_without_placement",
    )
    return {**{name: document[name] for name in kept}, "flags": codes.tolist(), "flag_names": FLAGS}


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A document with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _each_text(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_each_text(item, change) for item in value]
    return value


# ---- what a redacted report leaves out


def _hider(run: Run) -> Callable[[str], str]:
    """A function that takes names out of a text: of the model, the run, hosts, the dump and its files."""
    infos = [session.info for session in run.sessions]
    model = run.info.model
    names = {model, model_slug(model), run.info.run_id, str(run.path), str(run.path.resolve())}
    names |= {part for part in (*model.split("/"), run.path.resolve().name) if part}
    names |= {text for info in infos for text in (info.host, info.session_id, info.run_id)}
    if run.info.origin is not None:
        names |= {part for file in run.info.origin.files for part in (file.name, Path(file.name).name)}
    # The longest first, and as words only: a run may be called "1".
    pattern = "|".join(re.escape(name) for name in sorted(names, key=lambda n: (-len(n), n)) if len(name) > 2)
    word = re.compile(rf"(?<!\w)(?:{pattern})(?!\w)")
    return lambda text: word.sub(HIDDEN, clean(text)) if pattern else clean(text)
