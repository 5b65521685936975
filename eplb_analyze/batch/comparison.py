"""The rows of a batch side by side: sorted, grouped, and compared with a threshold or a baseline run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from eplb_analyze.batch.rows import Row
from eplb_analyze.batch.targets import Target
from eplb_analyze.errors import NotInDumpError
from eplb_analyze.json_report import Report
from eplb_analyze.metrics import bootstrap
from eplb_analyze.metrics.bootstrap import MIN_STEPS, Ratio
from eplb_analyze.storage import path as storage
from eplb_analyze.text import listed
from eplb_dump.format.frozen import frozen
from eplb_dump.format.schema import RUN_PREFIX, Scope

if TYPE_CHECKING:
    import polars as pl

#: The fields of a row that runs can be grouped by.
_FIELDS = {f.name for f in fields(Row)} - {"series", "faults", "config"}


@frozen
class Group:
    """Runs with a value in common. Figures are means over steps; balancedness over steps with tokens."""

    #: What the runs of the group have in common.
    value: str
    #: Runs of the group.
    runs: int
    #: Runs of the group that have no figures.
    broken: int
    steps: int
    balancedness: float | None
    idle_fraction: float | None
    #: The sum over the runs in which it is known.
    lost_rank_seconds: float | None

    @classmethod
    def of(cls, value: str, rows: list[Row]) -> Group:
        def mean(figure: str, count: str) -> float | None:
            known = [row for row in rows if getattr(row, figure) is not None]
            steps = sum(getattr(row, count) for row in known)
            total = sum(getattr(row, figure) * getattr(row, count) for row in known)
            return total / steps if steps else None

        lost = [row.lost_rank_seconds for row in rows if row.lost_rank_seconds is not None]
        return cls(
            value=value,
            runs=len(rows),
            broken=sum(row.status == "broken" for row in rows),
            steps=sum(row.steps for row in rows),
            balancedness=mean("balancedness", "active_steps"),
            idle_fraction=mean("idle_fraction", "steps"),
            lost_rank_seconds=sum(lost) if lost else None,
        )


@frozen
class Postmortem(Report):
    #: The run that lost most GPU time first; broken runs last.
    rows: list[Row]
    fail_below: float | None = None
    #: The option `--baseline`.
    baseline: str | None = None

    @property
    def failed(self) -> list[Row]:
        """Rows below the threshold, worse than the baseline, or that cannot be judged."""
        if self.fail_below is None and self.baseline is None:
            return []
        return [row for row in self.rows if self._fails(row)]

    def _fails(self, row: Row) -> bool:
        too_low = self.fail_below is not None and (row.balancedness or 0.0) < self.fail_below
        return self.not_judged(row) is not None or too_low or row.worse_than_baseline

    def not_judged(self, row: Row) -> str | None:
        """Why a row cannot be judged."""
        if row.status == "broken":
            return "no figures"
        return row.not_compared or (_why_unknown(row) if self.fail_below is not None else None)

    def groups(self, by: str) -> list[Group]:
        """Rows grouped by a field of :class:`Row`, or by a dotted name of the engine's configuration."""
        rows: dict[str, list[Row]] = {}
        for row in self.rows:
            value = getattr(row, by) if by in _FIELDS else row.config.get(by)
            rows.setdefault("–" if value is None else str(value), []).append(row)
        return sorted((Group.of(value, own) for value, own in rows.items()), key=lambda g: g.value)

    def groupable(self) -> list[str]:
        """The names that runs can be grouped by."""
        return [*sorted(_FIELDS), *sorted({name for row in self.rows for name in row.config})]

    def to_json(self, by: str | None = None) -> dict[str, Any]:
        return self.document(
            {
                "runs": self.rows,
                #: The groups of `--group-by`.
                "groups": [] if by is None else self.groups(by),
                #: The option `--group-by`.
                "by": by,
                "fail_below": self.fail_below,
                "baseline": self.baseline,
                #: Runs that did not pass `--fail-below` or `--baseline`.
                "failed": [
                    {"dump": row.dump, "run_id": row.run_id, "model": row.model} for row in self.failed
                ],
            }
        )

    def frame(self) -> pl.DataFrame:
        """One row for each run; faults as a list, config as JSON."""
        import polars as pl

        types = {"str": pl.String, "int": pl.Int64, "float": pl.Float64, "Status": pl.String}
        schema: dict[str, Any] = {
            f.name: types.get(str(f.type).split(" |")[0]) for f in fields(Row) if f.name != "series"
        }
        schema |= {"faults": pl.List(pl.String), "config": pl.String}
        rows = [
            {
                name: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
                for name, value in (row.to_json() | {"config": json.dumps(row.config)}).items()
            }
            for row in self.rows
        ]
        return pl.DataFrame(rows, schema=schema)


def judge(rows: Iterable[Row], fail_below: float | None = None, baseline: str | None = None) -> Postmortem:
    """The rows sorted, and compared with the baseline.

    Args:
        fail_below: the balancedness that a run must have.
        baseline: the name of a run, as :func:`require_baseline` takes it.

    Raises:
        NotInDumpError: no run, or more than one, has the baseline's name, or that run has no figures.
    """
    rows = list(rows)
    if baseline is not None:
        named = require_baseline(baseline, rows)
        if named.status == "broken":
            raise NotInDumpError(f"--baseline {baseline}: it has no figures: {named.reason}")
        if unknown := _why_unknown(named):
            raise NotInDumpError(f"--baseline {baseline}: {unknown}")
        rows = compare(named, rows)
    return Postmortem(sorted(rows, key=lambda row: row.lost, reverse=True), fail_below, baseline)


AnyRun = TypeVar("AnyRun", Target, Row, Target | Row)


def require_baseline(baseline: str, runs: Sequence[AnyRun]) -> AnyRun:
    """The one run with this id, in this dump, or in this run folder.

    Raises NotInDumpError if there are none or several.
    """
    named = [run for run in runs if baseline.rstrip("/") in (run.run_id, run.dump.rstrip("/"), address(run))]
    if len(named) == 1:
        return named[0]
    several = named or [run for run in runs if run.run_id]
    texts = [address(run) if named else run.run_id for run in several]
    what = "several runs have this id; choose one of" if named else "no run has this id; the runs are"
    raise NotInDumpError(f"--baseline {baseline}: {what} {listed(sorted(set(texts)))}")


def address(run: Target | Row) -> str:
    """A run's folder."""
    inside = any(part.startswith(RUN_PREFIX) for part in PurePath(run.dump).parts)
    return run.dump.rstrip("/") if inside else storage.join(run.dump, f"{RUN_PREFIX}{run.run_id}")


def compare(baseline: Row, rows: Iterable[Row]) -> list[Row]:
    """The rows with their differences from a baseline run, by a block bootstrap."""
    base = _ratio(baseline)

    def compared(row: Row) -> Row:
        if row is baseline or row.status == "broken":
            return row
        for name in ("model", "num_layers", "num_logical_experts"):
            if getattr(row, name) != getattr(baseline, name):
                return replace(row, not_compared=f"different {name.removeprefix('num_').replace('_', ' ')}")
        if unknown := _why_unknown(row):
            return replace(row, not_compared=unknown)
        found = bootstrap.difference(base, _ratio(row))
        if found is None:
            return replace(
                row, not_compared=f"fewer than {MIN_STEPS} steps with tokens, in it or the baseline"
            )
        return replace(row, difference=found.value, difference_low=found.low, difference_high=found.high)

    return [compared(row) for row in rows]


def _why_unknown(row: Row) -> str | None:
    """Why the balancedness of a run is not known, although it has tokens."""
    if row.tier != "minutes" or row.scope != Scope.LOCAL.value:
        return None
    return "sums per minute of single ranks do not show the balancedness of steps"


def _ratio(row: Row) -> Ratio:
    sums = np.array(row.series, np.float64).reshape(-1, 2)
    return Ratio(sums[:, 0], sums[:, 1])
