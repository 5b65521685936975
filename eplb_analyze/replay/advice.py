"""What `advise` reports: a verdict, the best setting and its alternatives, each with its gain and price."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from eplb_analyze.analysis.milliseconds import Milliseconds
from eplb_analyze.analysis.traffic import Shares
from eplb_analyze.json_report import RunReport
from eplb_analyze.metrics import bootstrap
from eplb_analyze.metrics.bootstrap import Interval
from eplb_analyze.reader.recorded_setting import Setting
from eplb_analyze.replay.changes import Changes
from eplb_analyze.replay.replay import Links, Replay
from eplb_dump.format.frozen import frozen

#: A gain below this share of the time is not worth a change.
MIN_GAIN = 0.02

Verdict = Literal["leave", "enable", "retune", "fix", "not enough data"]
#: The verdicts that advise a setting.
CHANGES = ("enable", "retune")


@frozen
class ScoredSteps:
    """The steps scored in one part of the run."""

    first_step: int
    last_step: int
    steps: int


@frozen
class Price:
    """What a setting costs, at the rate of the whole run."""

    #: How often experts are rearranged.
    rearrangements_per_1000_steps: float
    #: What their pauses take; None if the pause of a rearrangement is only assumed.
    pause_ms_per_1000_steps: float | None
    #: Expert weights fetched by all ranks.
    weights_moved_per_1000_steps: float
    #: Their size; None if the size of an expert is not known.
    gb_moved_per_1000_steps: float | None
    #: Expert weights that a GPU holds beyond one of each expert, over all layers.
    redundant_experts_per_gpu: float
    #: Their size; None if the size of an expert is not known.
    redundant_gb_per_gpu: float | None


@frozen
class Judged:
    """A setting in the judged part of the run; ``setting`` is None for the recorded placements."""

    setting: Setting | None
    balancedness: float | None
    idle_fraction: float | None
    rearrangements: int
    weights_moved: int
    active_experts: float | None
    #: What it costs.
    price: Price
    #: The share of today's time that it saves; None for today, or if it is not measurable.
    gain: Interval | None = None
    #: What imbalance costs less, minus the pauses of rearrangements beyond today's; None: not measurable.
    net_ms_per_step: Milliseconds | None = None
    #: The gain without pauses.
    gain_ms_per_step: Milliseconds | None = None
    #: For an alternative: the share of the time that ``best`` saves beside it, in the same steps.
    best_saves: Interval | None = None
    #: Where tokens go, on average; None if the recording does not show which rank sent them.
    traffic: Shares | None = None
    #: The busiest links, in all steps; None if not known.
    links: Links | None = None
    #: How to start the engine with it, if known.
    engine_arguments: str | None = None


@frozen
class Advice(RunReport):
    """``gain`` is the share of today's time that ``best`` saves in the judged part.

    By objective ``ms`` that is ``net_ms_per_step`` beside the mean step; by ``tokens`` the tokens of the
    ranks with most of them are time, and by ``active`` the active experts.
    """

    verdict: Verdict
    #: Why, in sentences; for ``not enough data``, what is missing. If the load balancer does not work, that
    #: comes first.
    reasons: list[str]
    #: What is wrong with the load balancer, also the first of the reasons; None: nothing that is known. The
    #: verdict is then ``fix``: a setting of a load balancer that does not act has no effect.
    fault: str | None = None
    #: The best setting of the training part, whatever the verdict; None if none could be tried.
    best: Judged | None = None
    #: The recorded placements in the judged steps.
    today: Judged | None = None
    #: The best settings of other kinds, by the training part; two at most.
    alternatives: list[Judged] = field(default_factory=list)
    #: Whether chance explains the differences between the settings; None if nothing is compared.
    comparison: str | None = None
    #: If the setting rearranges less often: the interval from which pauses take less than ``min_gain``.
    least_interval: int | None = None
    #: The pause of a rearrangement at which there is no gain left; None if there are no more than today.
    break_even_pause_ms: float | None = None
    #: The gain in the steps that the setting was chosen on.
    training_gain: float | None = None
    #: The time to fetch one expert of one layer at which there is no gain left; None if the setting moves no
    #: more than today, or if times are not known.
    break_even_ms: float | None = None
    #: The steps that the setting was chosen on.
    trained: ScoredSteps | None = None
    #: The steps that it is judged on.
    judged: ScoredSteps | None = None
    #: The option `--min-gain`.
    min_gain: float = MIN_GAIN
    #: The mean time of a judged step without pauses and idle gaps, ms; the median if most steps are of phases
    #: without a price; None if not known.
    step_ms: float | None = None
    #: What each change of one part of the setting gains by itself; None if none was tried.
    changes: Changes | None = None
    #: The replay behind it; None if the run cannot be replayed.
    replay: Replay | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def gain(self) -> Interval | None:
        """The share of time that ``best`` saves in the judged steps."""
        return None if self.best is None else self.best.gain

    @property
    def net_ms_per_step(self) -> Milliseconds | None:
        """What imbalance costs less, minus the pauses of rearrangements beyond today's; None: not known."""
        return None if self.best is None else self.best.net_ms_per_step

    @property
    def gain_ms_per_step(self) -> Milliseconds | None:
        """The gain without pauses."""
        return None if self.best is None else self.best.gain_ms_per_step

    @property
    def engine_arguments(self) -> str | None:
        """How to start the engine with the advised setting, if known."""
        return self.best.engine_arguments if self.best is not None and self.verdict in CHANGES else None

    @property
    def options(self) -> list[Judged]:
        """The best setting and its alternatives."""
        return [] if self.best is None else [self.best, *self.alternatives]

    @property
    def less_often(self) -> bool:
        """Whether the advice is to rearrange less often, or never."""
        if self.verdict not in CHANGES or self.best is None or self.replay is None:
            return False
        setting, today = self.best.setting, self.replay.recorded
        if setting is None or not self.replay.today.moves or today.interval is None:
            return False
        return setting.interval is None or setting.interval > today.interval

    @property
    def measured_balancedness(self) -> float | None:
        """The recorded balancedness, over all steps scored."""
        return None if self.replay is None else self.replay.measured_balancedness

    def passes(self, least: float) -> bool:
        """Whether the recorded balancedness is known and at least ``least``."""
        return self.measured_balancedness is not None and self.measured_balancedness >= least

    def to_json(self) -> dict[str, Any]:
        replay = self.replay
        return self.document(
            {
                "verdict": self.verdict,
                "reasons": self.reasons,
                "fault": self.fault,
                "advised": self.best if self.verdict in CHANGES else None,
                "best": self.best,
                "alternatives": self.alternatives,
                "comparison": self.comparison,
                "today": self.today,
                "recorded": replay and replay.recorded,
                "gain": self.gain,
                "objective": replay and replay.objective,
                "objective_reason": replay and replay.objective_reason,
                "net_ms_per_step": self.net_ms_per_step,
                "gain_ms_per_step": self.gain_ms_per_step,
                "pause": replay and replay.pause,
                "break_even_pause_ms": self.break_even_pause_ms,
                "cost": replay and replay.cost,
                "confidence": bootstrap.CONFIDENCE,
                "training_gain": self.training_gain,
                "changes": self.changes,
                "break_even_ms": self.break_even_ms,
                "least_interval": self.least_interval,
                "engine_arguments": self.engine_arguments,
                "min_gain": self.min_gain,
                "step_ms": self.step_ms,
                "trained": self.trained,
                "judged": self.judged,
                #: How many settings were tried.
                "settings_tried": 0 if replay is None else len(replay.outcomes),
                "cost_per_expert_ms": replay and replay.cost_per_expert_ms,
                #: What was recorded, over all selected steps.
                "measured": {
                    "balancedness": self.measured_balancedness,
                    "idle_fraction": replay and replay.measured_idle_fraction,
                },
                "steps": replay and replay.part.whole,
                "notes": self.notes,
            }
        )
