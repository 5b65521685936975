"""What `timeline` reports: a formula over the steps of a run, in bins."""

from __future__ import annotations

from dataclasses import asdict, field
from typing import TYPE_CHECKING, Literal

from eplb_analyze.json_report import RunReport
from eplb_analyze.metrics.formulas import ACTIVE_EXPERTS, FORMULAS
from eplb_analyze.reader.completeness import Completeness
from eplb_dump.format.frozen import frozen

if TYPE_CHECKING:
    import polars as pl

IDLE_FRACTION = "idle_fraction"
NAMES = (*FORMULAS, ACTIVE_EXPERTS.name, IDLE_FRACTION)
DEFAULT_BINS = 100


@frozen
class Bin:
    """A range of steps; the figures are None if none of them is complete and active."""

    first_step: int
    last_step: int
    #: The number of steps that the figures are over.
    steps: int
    mean: float | None
    min: float | None
    max: float | None


@frozen
class Stretch:
    """A stretch of steps of one shape."""

    first_step: int
    last_step: int
    ep_size: int
    num_physical_experts: int


@frozen
class Timeline(RunReport):
    """A formula over the steps of a run, in bins."""

    formula: str
    #: The model's number of the layer; None for all layers.
    layer: int | None
    steps: Completeness
    #: Ranks that all steps lack: the figures are estimates, by the loads of the others.
    missing_ranks: list[int]
    mean: float | None
    min: float | None
    max: float | None
    bins: list[Bin]
    #: The first step of each; of one layer, the steps at which its placement changed.
    rearrangements: list[int]
    configurations: list[Stretch]
    notes: list[str] = field(default_factory=list)
    #: The source of the figures: `steps`, or sums over `minutes`.
    tier: Literal["steps", "minutes"] = "steps"
    #: The most minutes of a bin; null if figures are from steps.
    bin_minutes: int | None = None

    def frame(self) -> pl.DataFrame:
        """One row per bin: first_step, last_step, steps, mean, min, max."""
        import polars as pl

        schema = dict.fromkeys(("first_step", "last_step", "steps"), pl.Int64)
        schema |= dict.fromkeys(("mean", "min", "max"), pl.Float64)  # type: ignore[arg-type]
        return pl.DataFrame(list(map(asdict, self.bins)), schema=schema)
