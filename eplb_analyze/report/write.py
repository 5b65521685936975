"""Writing a report: the figures, the page, and the file, whole or not at all."""

from __future__ import annotations

from pathlib import Path

from eplb_analyze.atomic import new_file, require_free
from eplb_analyze.json_report import RunReport
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.run import Run
from eplb_analyze.report.document import report_document
from eplb_analyze.report.page import page
from eplb_dump.format.frozen import frozen


@frozen
class WrittenReport(RunReport):
    """What was written."""

    file: Path
    bytes: int
    #: Whether names were replaced.
    redacted: bool
    #: How complete the selected steps are.
    steps: Completeness
    #: The source of the figures, as in `summary`: `steps`, or sums over `minutes`.
    tier: str
    #: Bins of time that the reader of the page can select; 0 if no step is complete.
    bins: int


def report_page(run: Run) -> bytes:
    """The report of a whole run, as HTML."""
    return page(report_document(run).document)


def write_report(
    run: Run,
    file: Path,
    steps: tuple[int, int] | None = None,
    *,
    top: int = 10,
    redact: bool = False,
    force: bool = False,
) -> WrittenReport:
    """Write the report of a run, or of a half-open range of its steps, as one HTML file.

    Args:
        top: how many rows of a ranking are shown at first.
        redact: leave out names of models, runs, hosts and files.
        force: replace a file that is there.

    Raises:
        UsageError: there is a file already, it lies in the dump, or it cannot be written.
        NotInDumpError: no step of the run is in the range.
    """
    require_free(file, force=force, dump=run.path)
    report = report_document(run, steps, top=top, redact=redact)
    data = page(report.document)
    with new_file(file, force=force) as out:
        out.write(data)
    return WrittenReport(
        run.info.run_id,
        run.info.model,
        file,
        len(data),
        redact,
        report.steps,
        report.document["summary"]["tier"],
        report.bins,
    )
