"""What a report says in words: what to know before any figure, the run in sentences, what figures mean."""

from __future__ import annotations

from collections import Counter
from typing import Any

from eplb_analyze.analysis.cost import PhaseCost, RunCost
from eplb_analyze.analysis.experts import ExpertReport
from eplb_analyze.analysis.rearrangements import RearrangementReport
from eplb_analyze.analysis.summary_report import OTHER_FORMULAS, Summary
from eplb_analyze.metrics.cost import CostStatus
from eplb_analyze.metrics.formulas import FORMULAS
from eplb_analyze.reader.clock import RunClock
from eplb_analyze.reader.join import StepState
from eplb_analyze.report.answer import cost_sentence
from eplb_analyze.text import clean, figure, milliseconds, percent, plural, signed


def tokens(summary: Summary) -> str:
    """What the other figures say of time."""
    if summary.cost.ms_per_step is None:
        return f"All figures count tokens, not milliseconds; the cost of imbalance is {summary.cost.message}."
    return "All other figures count tokens, not milliseconds."


def cost(summary: Summary) -> dict[str, Any]:
    """What imbalance cost, as the page shows it: ``tile`` (value, text), ``text``, ``rows`` by phase."""
    found = summary.cost
    ms, share = found.ms_per_step, found.share_of_step
    if ms is None:
        tile, text = ["not measured", found.message.partition(": ")[2]], cost_sentence(found)
    elif share is None:
        value, bounds = milliseconds(ms.estimate, ms.low, ms.high).split(" (")
        tile, text = [value, f"({bounds} estimated from kernel times, not measured"], cost_sentence(found)
    else:
        of = f"of each {milliseconds(ms.high / share.high if share.high else found.step_ms_p50)} step"
        value, bounds = milliseconds(ms.estimate, ms.low, ms.high).split(" (")
        tile = [value, f"{of}, {percent(share.estimate)} (95% CI {bounds}"]
        if found.status is CostStatus.MEASURED and found.phases_differ:
            tile = _most_frequent(found)
        if found.status is not CostStatus.MEASURED:
            tile = ["none", f"that can be measured: at most {milliseconds(ms.high)} {of}"]
        text = (
            f"{cost_sentence(found)} Step time p50 {milliseconds(found.step_ms_p50)}, p95 "
            f"{milliseconds(found.step_ms_p95)}; {found.evidence}. Left out: "
            f"{plural(found.idle_gaps, 'idle gap')}, {plural(found.pauses, 'step')} at rearrangements."
        )
    return {"tile": tile, "text": text, "rows": [_phase(*item) for item in found.phases.items()]}


def _most_frequent(cost: RunCost) -> list[str]:
    """The tile of a cost that is measured in some phases only: that of the largest of these."""
    name = max(cost.measured_phases, key=lambda name: cost.phases[name].steps)
    ms, share = cost.phases[name].ms_per_step, cost.phases[name].share_of_step
    assert ms is not None
    assert share is not None
    value, bounds = milliseconds(ms.estimate, ms.low, ms.high).split(" (")
    of = milliseconds(ms.high / share.high)
    return [value, f"of each {of} step, {percent(share.estimate)} (95% CI {bounds}, in {clean(name)}"]


def _phase(name: str, cost: PhaseCost) -> list[str]:
    ms, share = cost.ms_per_step, cost.share_of_step
    known = "–" if ms is None else milliseconds(ms.estimate, ms.low, ms.high)
    if ms is not None and cost.status is CostStatus.NO_MEASURABLE_COST:
        known = f"none measurable (≤ {milliseconds(ms.high)})"
    part = percent(share.estimate if share and cost.status is CostStatus.MEASURED else None)
    why = cost.regime or cost.message
    return [name, f"{cost.steps:,}", milliseconds(cost.step_ms), known, part, figure(cost.r2, 2), why]


def sentences(
    summary: Summary,
    experts: ExpertReport | None,
    changes: RearrangementReport,
    clock: RunClock,
) -> list[str]:
    """The run in a few sentences beside the answer; none without a complete step."""
    if summary.spreads["balancedness"].mean is None:
        return []
    parts = [_balancedness(summary, clock), _idle(summary), _costliest(summary), _hottest(summary)]
    if experts is not None:
        parts.append(_replication(experts))
    parts.append(_changes(changes, summary, clock))
    return [part for part in parts if part]


def _balancedness(summary: Summary, clock: RunClock) -> str:
    s, count = summary.spreads["balancedness"], summary.steps.count(StepState.RECORDED)
    if s.min_step is None:
        return ""
    at = clock.label(s.min_step)
    if count == 1:
        return f"Balancedness was {figure(s.mean)} in the only complete step, {at} (1 is perfect)."
    return (
        f"Balancedness was {figure(s.mean)} on average over {plural(count, 'step')} (1 is perfect); "
        f"one step in twenty was below {figure(s.p5)}, the worst {figure(s.min)} at {at}."
    )


def _idle(summary: Summary) -> str:
    return f"The mean rank had {percent(summary.idle_fraction)} fewer tokens than the slowest."


def _costliest(summary: Summary) -> str:
    loss = summary.loss
    if loss is None or not loss.tokens or not loss.ranks:
        return ""
    rank = loss.ranks[0]
    last = _last_configuration(summary)
    who = f"In {last} rank" if last else "Rank"
    return f"{who} {rank.rank} had the most excess tokens, {percent(rank.share, 0)} of all."


def _last_configuration(summary: Summary) -> str:
    """The steps that losses and hot experts are over, if not all."""
    last = summary.last_configuration_steps
    return _steps(*last) if last is not None and len(summary.configurations) > 1 else ""


def _steps(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first}-{last}"


def _hottest(summary: Summary) -> str:
    if not summary.hot_experts:
        return ""
    hot = summary.hot_experts[0]
    last = _last_configuration(summary)
    who = f"expert {hot.logical} of layer {hot.layer}"
    times = f"the layer's tokens, {hot.times_mean:.2f}x the mean"
    slots = f"{plural(hot.replicas, 'slot')} at the end"
    if summary.hot_experts_tier == "minutes":
        who = f"In {last} {who}" if last else f"E{who[1:]}"
        return f"{who} had at least {percent(hot.share, 2)} of {times}, in {slots}."
    which = f"In {last} the" if last else "The"
    return f"{which} hottest expert is {who}: {percent(hot.share, 2)} of {times}, in {slots}."


def _replication(report: ExpertReport) -> str:
    counts = report.counts
    hot = f"Of {plural(counts['experts'], 'expert')} in all layers, "
    if tells_bursts(report):
        hot += (
            f"{_are(counts['always'])} always hot and {_are(counts['bursts'])} hot in bursts: at least "
            f"{report.hot_factor:g}x the layer's mean in a window of {plural(report.window, 'step')}"
        )
    else:
        hot += f"{_are(counts['always'])} hot: at least {report.hot_factor:g}x the layer's mean"
    few, many = counts["under_replicated"], counts["over_replicated"]
    if not few and not many:
        return (
            f"{hot}. By the loads since the last rearrangement, no expert has too few or too many replicas."
        )
    wrong = [
        f"{n:,} {'has' if n == 1 else 'have'} too {word}" for n, word in ((few, "few"), (many, "many")) if n
    ]
    return f"{hot}. By the loads since the last rearrangement, {' and '.join(wrong)} replicas."


def _are(count: int) -> str:
    return f"{count:,} {'is' if count == 1 else 'are'}"


def tells_bursts(report: ExpertReport) -> bool:
    """Whether there is a second window, so that what is always hot differs from what is hot in bursts."""
    return report.windows > 1


def expert_notes(report: ExpertReport) -> list[str]:
    """Notes of `experts` without its option names; those on bursts only if the report mentions bursts."""
    option, bursts = "--window-steps", tells_bursts(report)
    return [
        note.replace(option, f"{option} of `experts`")
        for note in report.notes
        if bursts or option not in note
    ]


#: What a verdict of `rearrangements` says in a sentence.
_VERDICTS = {
    "helped": "helped",
    "helped at first": "helped at first, until the load drifted",
    "hurt": "hurt",
    "no measurable gain": "had no measurable gain",
    "no-op": "moved nothing to another rank",
    "elastic": "changed the EP size or the number of slots",
    "not measured": "could not be measured",
}


def _changes(report: RearrangementReport, summary: Summary, clock: RunClock) -> str:
    rows = report.rearrangements
    if not rows:
        if summary.acted is None:
            return "It is not known when placements changed, so rearrangements are not known either."
        if summary.acted is False:
            return summary.not_due or ""  # if one was due, a warning in capitals comes first
        return "There is no rearrangement in these steps."
    verdicts = Counter(row.verdict for row in rows).most_common()
    told = ", ".join(f"{count:,} {_VERDICTS[verdict]}" for verdict, count in verdicts)
    text = f"{plural(len(rows), 'rearrangement')}: {told}."
    gains = [row for row in rows if row.gain is not None and row.verdict in ("helped", "hurt")]
    if gains:
        most = max(gains, key=lambda row: abs(row.gain or 0.0))
        at = clock.label(most.first_step)
        text += f" The largest effect, {signed(most.gain)} balancedness, was at {at}."
    return text


_BURSTS = "always hot, in bursts"
#: Name, formula, meaning, as in docs/metrics.md, which has the sources.
_MEANINGS = (
    (
        "balancedness",
        FORMULAS["balancedness"].text,
        "The mean tokens of the ranks divided by the tokens of the busiest rank, averaged over the layers "
        "that have tokens in the step; 1 is perfect. T: tokens of a step and layer on an EP rank.",
    ),
    (
        "imbalance",
        FORMULAS["imbalance"].text,
        "The inverse: the tokens of the busiest rank divided by the mean; at least 1.",
    ),
    (
        "idle fraction",
        "1 − Σ mean_r T / Σ max_r T over steps and layers",
        "How many fewer tokens the mean rank has than the slowest. It is not time: a step may take just as "
        "long with a tenth of the tokens.",
    ),
    (
        "cost of imbalance",
        "Σ over layers of (max_r − mean_r) of a · active experts + b · tokens",
        "What a perfect balance of the same loads would save in each step, in ms. The times a and b are "
        "fitted to the recorded step times; idle gaps and steps at rearrangements are left out. If the 95% "
        "interval contains 0, there is no measurable cost.",
    ),
    (
        "loss, excess tokens",
        "max_r T − mean_r T",
        "In each step and layer, all ranks wait for the slowest, which has this many tokens more than the "
        "mean. They are attributed to this rank, or shared by ranks that tie. The part that remains if loads "
        "are summed over 128 steps is persistent. A better placement can remove at most this part; the rest "
        "is random variation from step to step.",
    ),
    (
        "x mean",
        "a rank's, slot's or expert's tokens / the layer's mean of these",
        "Colors of the heat maps: blue below the mean, red above it and darkest at twice the mean or more. "
        "Loads are first summed over the selected steps, which removes random variation from step to step.",
    ),
    (
        "share",
        "an expert's tokens / its layer's tokens",
        "Loads are recorded by slot and assigned to logical experts by the placement in force at each step.",
    ),
    (
        "due replicas",
        "share × number of slots",
        "The number of slots that the expert's load justifies at the mean load per slot. If it is at least 1 "
        "above the number of replicas, the expert is under-replicated; if it is at least 1 below (with "
        "several replicas), over-replicated.",
    ),
    (
        _BURSTS,
        "share of windows with 2x the layer's mean or more",
        "Always hot: hot in at least nine of ten windows, so another replica helps permanently. In bursts: "
        "hot in fewer windows; the burst may be over before the next rearrangement.",
    ),
    (
        "rearrangement",
        "balancedness before, predicted, after",
        "A change of placement after the first placement; changes that belong together are one. Before and "
        "after are means over up to 1,000 complete steps on either side. Predicted: the loads before, split "
        "evenly over the replicas of the new placement. The 95% interval of the gain comes from a block "
        "bootstrap; a verdict of helped or hurt means that it does not contain 0.",
    ),
    (
        "complete steps",
        "steps that every expected rank recorded, or idled in",
        "Figures use only these steps. A step that lacks a rank is counted as incomplete, and no figure "
        "includes it.",
    ),
    (
        "other formulas",
        "; ".join(f"{name}: {FORMULAS[name].text}" for name in OTHER_FORMULAS),
        "The formulas behind the figures in engines' logs, for comparison. vllm-legacy is wrong; it helps to "
        "read old logs.",
    ),
)


def meanings(*, bursts: bool) -> list[dict[str, str]]:
    """What each figure means: ``name``, ``formula``, ``text``; bursts only if the report mentions them."""
    return [
        {"name": name, "formula": formula, "text": text}
        for name, formula, text in _MEANINGS
        if bursts or name != _BURSTS
    ]
