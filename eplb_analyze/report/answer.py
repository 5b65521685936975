"""The sentences that `summary` and the report page begin with: what was wrong, when, its cost, what to do.

Every sentence that both show is composed here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from eplb_analyze.analysis.cost import TIMES, PhaseCost, RunCost
from eplb_analyze.analysis.incident_words import cause_sentence, steps_text, where
from eplb_analyze.analysis.incidents import Incident
from eplb_analyze.analysis.milliseconds import Milliseconds
from eplb_analyze.analysis.summary_report import left_out_files, warnings
from eplb_analyze.metrics.cost import CostStatus, Driver
from eplb_analyze.metrics.losses import LEAST_STEPS
from eplb_analyze.reader.completeness import ABSENT, Completeness
from eplb_analyze.reader.join import StepState
from eplb_analyze.text import clean, command_line, duration, figure, listed, milliseconds, percent, plural
from eplb_dump.format.frozen import frozen

if TYPE_CHECKING:
    from eplb_analyze.analysis.summary_report import Loss, Rollup, Summary
    from eplb_analyze.reader.clock import RunClock
    from eplb_analyze.reader.run_info import RunInfo
    from eplb_analyze.sessions.step_range import StepRange

#: The verdict and the warnings as they stand out, in a pipe too.
TITLES = {
    "balanced": "BALANCED",
    "mostly_balanced": "MOSTLY BALANCED",
    "imbalanced": "IMBALANCED",
    "eplb_never_acted": "EPLB NEVER ACTED",
    "incomplete_data": "INCOMPLETE DATA",
    "not_known": "BALANCE OF STEPS NOT KNOWN",
    "rank_lost": "RANK LOST",
}
#: The command that tells more about a verdict.
NEXT_COMMANDS = {"imbalanced": "advise", "eplb_never_acted": "advise", "incomplete_data": "check"}
#: So many of the worst layers and ranks of an imbalanced run are named.
SHOWN_WORST = 3
#: A rearrangement at most so many steps from the last step of an incident is at its end.
AT_ITS_END = 20
#: A cost below the first share of the step time makes no engine noticeably slower; one above the second is a
#: large part of that time.
EXPLAINS_LITTLE, LARGE_PART = 0.05, 0.1
#: The figure of sums per minute if each rank wrote its own; it is never called balancedness alone.
SUMMED_BALANCEDNESS = "balancedness of loads summed per minute"
#: What else makes an engine slow.
ELSEWHERE = "queueing, KV cache, prefill, network"
#: What a token costs is fitted to the steps that were selected.
IN_PART = "; by the times of the selected steps, so in the whole run it can differ a little"


def _percent(value: float | None, digits: int = 1) -> str:
    """As English text has it: ``12%``."""
    return percent(value, digits).replace(" ", "")


@frozen
class Told:
    """One incident in words: when and where, then ``(name, text)`` of its cause, cost, end, next command."""

    head: str
    parts: list[tuple[str, str]]


@frozen
class Answer:
    """What a person reads first."""

    #: `BALANCED` and the like.
    title: str
    #: The balancedness behind it; empty if there is none.
    figures: str
    #: What limits all figures; each starts with words in capitals, which may be the title.
    warnings: list[str]
    #: Whether imbalance explains a slow engine, what it costs, and how much better placement can remove.
    sentences: list[str]
    #: Figures of steps that lack ranks, if these are more than the tail of a killed run.
    estimates: list[str]
    #: ``(name, text)`` of the worst layers and ranks, if the run is imbalanced, and of the next command.
    evidence: list[tuple[str, str]]
    incidents: list[Told]


#: Makes of a command, ``layer 12 --steps 10-19``, a line to paste into a shell.
Paste = Callable[[str], str]


def answer_of(summary: Summary, clock: RunClock, paste: Paste = command_line) -> Answer:
    """The answer about a run; ``paste`` may add to commands which run they are about."""
    verdict, spread = summary.verdict, summary.spreads["balancedness"]
    figures, rollup = "", summary.rollup
    if spread.mean is not None:
        error = "" if spread.percentile_error is None else f" ±{figure(spread.percentile_error)}"
        figures = f"balancedness {figure(spread.mean)} (5th percentile {figure(spread.p5)}{error})"
    elif rollup is not None and rollup.summed is not None and rollup.summed.balancedness is not None:
        figures = f"{SUMMED_BALANCEDNESS} {figure(rollup.summed.balancedness)}"
    found = warnings(summary)
    pauses, costly = _pauses(summary, paste), _pauses_are_costly(summary)
    return Answer(
        title=TITLES[verdict.verdict],
        figures=figures,
        warnings=[f"{TITLES[kind]}: {text}" for kind, text in found],
        sentences=[
            *([] if figures or found else [verdict.rule]),
            *_rolled_up(summary),
            *(_judged(summary) if figures else []),
            *(pauses if costly else []),
            *([cost_sentence(summary.cost), *_measured_in(summary, clock)] if figures else []),
            *(_recoverable(summary) if figures else []),
            *([] if costly else pauses),
            *_long_gaps(summary, clock),
        ],
        estimates=_estimates(summary),
        evidence=_evidence(summary, paste),
        incidents=[told(incident, summary, clock, paste) for incident in summary.incidents],
    )


def source(summary: Summary, clock: RunClock) -> str | None:
    """That figures are from sums per minute, of which minutes, and what is kept; None if from steps."""
    rollup = summary.rollup
    if rollup is None:
        return None
    first, last = (clock.text(edge)[:-3] for edge in (rollup.first_minute, rollup.last_minute))
    count = f"{plural(rollup.minutes, 'whole minute')}, " if rollup.selected else ""
    minutes = f"{count}{first} only" if first == last else f"{count}{first} to {last}"
    parts = [f"figures come from per-minute sums ({minutes})"]
    if rollup.gone_until is not None:
        parts.append(f"steps before {clock.text(rollup.gone_until)} are gone")
    if rollup.finest == "minutes":
        parts.append("single steps are not kept")
    else:
        what = "" if rollup.finest == "full" else "tokens per EP rank of "
        since = "" if rollup.steps_since is None else f" from {clock.text(rollup.steps_since)} on"
        parts.append(f"{what}single steps are kept{since}")
        if rollup.loads_since is not None and rollup.loads_since != rollup.steps_since:
            parts.append(f"experts' loads are kept from {clock.text(rollup.loads_since)} on")
    return "; ".join(parts)


def searched(summary: Summary, clock: RunClock) -> str | None:
    """Where incidents were looked for, if not in all steps."""
    if summary.searched is None:
        return None
    if not summary.searched:
        return "incidents are not known: sums per minute do not show them, and no step was read"
    none = "" if summary.incidents else "; there is none"
    return f"incidents are looked for only in {_stretches(summary.searched, clock)}{none}"


def _stretches(parts: Sequence[StepRange], clock: RunClock) -> str:
    label = clock.range_label(parts[0].first, parts[-1].end - 1)
    if len(parts) == 1:
        return label
    return f"{sum(part.end - part.first for part in parts):,} steps of {label}"


def _measured_in(summary: Summary, clock: RunClock) -> list[str]:
    """Where the cost was measured, if not in all steps."""
    if not summary.cost_steps or summary.cost.ms_per_step is None:
        return []
    return [f"The cost covers only {_stretches(summary.cost_steps, clock)}, whose experts' loads are kept."]


def _rolled_up(summary: Summary) -> list[str]:
    """What else sums per minute show, and what they do not."""
    rollup = summary.rollup
    if rollup is None:
        return []
    found = []
    if rollup.summed is not None and rollup.summed.idle_at_least is not None:
        found.append(
            "Each rank wrote its own sums, which show only persistent imbalance: the idle fraction is at "
            f"least {_percent(rollup.summed.idle_at_least)}, and what varies from step to step comes on top."
        )
    ms = rollup.step_ms
    if ms is not None:
        median = ""
        if ms.p50 is not None and ms.percentile_error is not None:
            median = f" (median {milliseconds(ms.p50)} ±{ms.percentile_error:.2g})"
        found.append(f"From step to step, {milliseconds(ms.mean)} passed on average{median}.")
    return found


def heading(info: RunInfo) -> tuple[str, str]:
    """``("deepseek-ai/DeepSeek-V3", "on vllm 0.33.0, run wed-deploy-42")``."""
    engine = "" if not info.engine else f" on {info.engine}{' ' * bool(info.engine_version)}"
    return (
        info.model,
        f"{engine}{info.engine_version or ''}, run {info.run_id}" if engine else f", run {info.run_id}",
    )


def when(summary: Summary, clock: RunClock) -> str:
    """``2026-11-26 03:02:11-04:11:40 UTC (1.2 h), 3,000 steps``."""
    steps = summary.steps
    seen = plural(steps.seen, "step")
    if steps.first is None or steps.last is None:
        return seen
    return f"{clock.span_text((steps.first, steps.last)) or 'clock times are not known'}, {seen}"


def shape(info: RunInfo) -> str:
    """``58 MoE layers, 256 experts in 288 slots on 32 EP ranks``."""
    layers, experts = plural(info.num_layers, "MoE layer"), plural(info.num_logical_experts, "expert")
    slots = plural(info.num_physical_experts, "slot")
    return f"{layers}, {experts} in {slots} on {plural(info.ep_size, 'EP rank')}"


def data(summary: Summary, label: Callable[[int], str] = "step {}".format) -> tuple[bool, str]:
    """Whether all data is there, and in words. ``label`` names a step, with its time if that is known."""
    steps = summary.steps
    expected, present = len(summary.expected_ranks), len(summary.expected_ranks) - len(summary.missing_ranks)
    if not steps.seen:
        return False, "no step was recorded"
    if summary.run.scope == "global":
        who = f"one writer recorded the sum over {plural(summary.run.ep_size, 'EP rank')}"
    else:
        who = f"{present} of {plural(expected, 'rank')}"
    problems: list[str] = []
    if steps.count(StepState.INCOMPLETE):
        ranks = {rank for rank, _ in steps.reasons}
        lacking = f"rank {ranks.pop()}" if len(ranks) == 1 else "a rank"
        one = steps.count(StepState.INCOMPLETE) == 1
        text = f"{steps.count(StepState.INCOMPLETE):,} {'lacks' if one else 'lack'} {lacking}"
        if summary.rollup is not None and any(why != ABSENT for _, why in steps.reasons):
            text = f"{_were(steps.count(StepState.INCOMPLETE))} in minutes that lack a part of {lacking}"
        if not steps.incomplete_inside and steps.last_whole is not None:
            text += f", from {label(steps.last_whole + 1)} on"
        problems.append(text)
    problems += [
        f"{_were(steps.count(state))} {state.label.replace('_', ' ')}"
        for state in (StepState.DROPPED, StepState.REJECTED, StepState.NOT_SAMPLED)
        if steps.count(state)
    ]
    if steps.missing:
        problems.append(f"{_were(steps.missing)} seen by no rank")
    dummy = steps.count(StepState.DUMMY)
    idle = f"; {plural(dummy, 'step')} without tokens" if dummy else ""
    gone = summary.rollup is not None and steps.retired > 0
    idle += f"; {plural(steps.retired, 'step')} {'is' if steps.retired == 1 else 'are'} gone" if gone else ""
    count = summary.unlisted_files
    if not problems and not count and present == expected:
        return True, f"data complete{' where kept' if gone else ''}: {who}, no missing steps{idle}"
    facts = [who if summary.run.scope == "global" else f"{who} recorded"]
    if problems:
        facts.append(f"of {plural(steps.seen + steps.missing, 'step')}, {'; '.join(problems)}")
    elif not count:
        facts.append("no missing steps")
    if count:
        facts.append(left_out_files(summary))
    return False, f"data incomplete: {'; '.join(facts)}{idle}"


def _were(count: int) -> str:
    return f"{count:,} {'was' if count == 1 else 'were'}"


def contradiction(summary: Summary, paste: Paste = command_line) -> str | None:
    """The first way in which loads contradict each other or what engines state, in a sentence."""
    if not summary.contradictions:
        return None
    first = summary.contradictions[0]
    what = "num_tokens" if first.code == "num_tokens" else "each other"
    fact = first.text.partition("; ")[0].partition(": ")[0]
    return f"loads contradict {what}: {fact}; `{paste('check')}` explains it"


def cost_sentence(cost: RunCost) -> str:
    ms, share = cost.ms_per_step, cost.share_of_step
    if ms is None:
        return f"The cost of imbalance is not known: {cost.message.partition(': ')[2] or cost.message}."
    value = milliseconds(ms.estimate, ms.low, ms.high)
    if share is None:
        return (
            f"Imbalance would cost {value} per step, by {TIMES[cost.basis]}. The run does not show its cost."
        )
    estimate, _, bounds = value.partition(" (")
    step = milliseconds(ms.high / share.high if share.high else cost.step_ms_p50)
    by = TIMES.get(cost.basis, cost.basis)
    if cost.phases_differ:
        # One figure for all would count as 0 what was not measured.
        return f"{' '.join(_by_phase(cost))} Measured by {by}."
    if cost.status is CostStatus.MEASURED:
        return (
            f"Imbalance costs {estimate} of each {step} step, {_percent(share.estimate)} "
            f"(95% CI {bounds.rstrip(')')} ms), measured by {by}."
        )
    most = f"at most {milliseconds(ms.high)} of each {step} step ({_percent(share.high)})"
    return f"Imbalance has no measurable cost: {most}, by {by}."


def _by_phase(cost: RunCost) -> list[str]:
    """A sentence for each phase, those with a measured cost first."""
    order = [CostStatus.MEASURED, CostStatus.NO_MEASURABLE_COST, CostStatus.NOT_IDENTIFIABLE]
    all_steps = max(1, sum(phase.steps for phase in cost.phases.values()))
    found, of = [], " of the steps"
    for name, phase in sorted(cost.phases.items(), key=lambda item: order.index(item[1].status)):
        part = phase.steps / all_steps
        where = f"{clean(name)} ({_percent(part, 0) if part >= 0.01 else 'under 1%'}{of})"
        found.append(f"In {where}, {_of_phase(phase)}.")
        of = ""
    return found


def _of_phase(phase: PhaseCost) -> str:
    ms, share = phase.ms_per_step, phase.share_of_step
    if ms is None or share is None:
        return f"the cost is not measured: {phase.message}"
    step = milliseconds(ms.high / share.high if share.high else phase.step_ms)
    if phase.status is not CostStatus.MEASURED:
        return (
            f"imbalance costs between 0 and {milliseconds(ms.high)} of {step}, at most {_percent(share.high)}"
        )
    estimate, _, bounds = milliseconds(ms.estimate, ms.low, ms.high).partition(" (")
    return (
        f"imbalance costs {estimate} of each {step} step, {_percent(share.estimate)} "
        f"(95% CI {bounds.rstrip(')')} ms)"
    )


def _judged(summary: Summary) -> list[str]:
    """Whether imbalance explains a slow engine, by the bounds of what it costs; nothing between the two."""
    cost = summary.cost
    if cost.share_of_step is None or cost.status is CostStatus.ESTIMATED:
        return []
    # The steps that are left out may have been the slow ones.
    if summary.verdict.verdict == "incomplete_data" or summary.cost_steps is not None:
        return []
    costs = [incident.cost.ms_per_step for incident in summary.incidents]
    noticeable = EXPLAINS_LITTLE * (cost.step_ms_p50 or 0.0)
    shares = {"": cost.share_of_step}
    if cost.phases_differ:
        shares = {clean(n): p.share_of_step for n, p in cost.phases.items() if p.share_of_step is not None}
    found = []
    small = {name: share.high for name, share in shares.items() if share.high < EXPLAINS_LITTLE}
    # An incident can be costly though the mean over the run is not.
    if small and all(ms is None or ms.high < noticeable for ms in costs):
        where = f"in {listed([*small])}" if cost.phases_differ else "here"
        most = _percent(max(small.values()))
        found.append(
            f"Expert imbalance does not explain a slow engine {where}: "
            f"it costs at most {most} of the step time."
        )
    large = {name: share.low for name, share in shares.items() if share.low > LARGE_PART}
    if large:
        where = f" in {listed([*large])}" if cost.phases_differ else ""
        least = _percent(min(large.values()))
        found.append(f"Expert imbalance costs a large part of the step time{where}: at least {least}.")
    return found


def _drivers(cost: RunCost) -> set[Driver | None]:
    """What makes the slowest rank slow, in the phases with a measured cost."""
    return {phase.driver for phase in cost.phases.values() if phase.status is CostStatus.MEASURED}


def _recoverable(summary: Summary) -> list[str]:
    """How much of the imbalance in tokens better placement can remove, if that is known."""
    loss = summary.loss
    if _drivers(summary.cost) == {Driver.ACTIVE_EXPERTS}:
        # A share of the excess tokens says nothing about a time that does not depend on tokens.
        return ["Steps wait for the rank with the most active experts: balancing tokens alone saves nothing."]
    if loss is None or not loss.tokens:
        return []
    last, where = summary.last_configuration_steps, ""
    if last is not None and len(summary.configurations) > 1:
        where = f" in steps {last[0]}-{last[1]}"
    if loss.persistent_share is None:
        return [f"{too_few_steps(summary, loss)}{where}."]
    most = _percent(loss.persistent_share, 0)
    text = f"Better placement can remove at most {most} of the imbalance in tokens{where}"
    return [f"{text}; the rest varies {varies(summary)}." if loss.persistent_share < 0.995 else f"{text}."]


def varies(summary: Summary) -> str:
    """How that part of the imbalance varies which no placement can remove."""
    return "from step to step" if summary.rollup is None else "within a minute"


def too_few_steps(summary: Summary, loss: Loss) -> str:
    """Why the share that a better placement can remove is not known."""
    which, most = "under one placement", ""
    if summary.rollup is not None:
        which, most = "of one phase and placement in a minute", "at most "
    steps = f"{most}{loss.window_steps:,}; {LEAST_STEPS} are needed"
    return f"Too few steps {which} ({steps}) to tell how much of the imbalance better placement can remove"


def _pauses(summary: Summary, paste: Paste) -> list[str]:
    """How long rearrangements paused the engine, if that is known."""
    total = summary.pause_total
    if total is None:
        return []
    who, unknown = plural(total.measured, "rearrangement"), len(summary.rearrangements) - total.measured
    rest = f"; of {unknown:,} more it is not known" if unknown else ""
    ms, share = total.ms_total, total.share_of_run
    if ms.low <= 0:
        most = f" (at most {_time_text(ms.high)})" if ms.high > 0 else ""
        return [f"{who} paused the engine for no measurable time{most}{rest}."]
    of = f" ({_percent(share)} of the run)" if share is not None else ""
    how = f"{_time_text(ms.estimate)}{' in all' if total.measured > 1 else ''}{of}"
    text = f"{who} paused the engine for {how}{rest}; `{paste('rearrangements')}` shows whether that pays."
    return [f"Rearrangements do cost time: {text}" if _pauses_are_costly(summary) else text]


def _pauses_are_costly(summary: Summary) -> bool:
    """Whether they may explain a slow engine, so that they are told first."""
    total = summary.pause_total
    return total is not None and total.ms_total.low > 0 and (total.share_of_run or 0.0) >= EXPLAINS_LITTLE


def _long_gaps(summary: Summary, clock: RunClock) -> list[str]:
    gaps = summary.long_gaps
    if gaps is None:
        return []
    what = "gap" if gaps.count == 1 else "gaps"
    each = [f"{_time_text(gap.ms)} before {clock.label(gap.step)}" for gap in gaps.longest]
    more = ""
    if gaps.count > len(gaps.longest):
        more = f" ({gaps.count:,} such gaps, {_time_text(gaps.ms_total)} in all)"
    return [
        f"Longest {what} between steps without a rearrangement: {', '.join(each)}{more}; the median is "
        f"{milliseconds(gaps.median_ms)}. Whether the engine was idle or stalled is not known."
    ]


def _estimates(summary: Summary) -> list[str]:
    ranks = summary.run.ep_size
    return [
        f"estimate from {ranks - len(e.missing_ranks)} of {ranks} ranks, "
        f"{steps_text(e.first_step, e.last_step)}, without rank {listed(e.missing_ranks)}: "
        f"balancedness {figure(e.balancedness.mean)}, imbalance {figure(e.imbalance.mean)}, "
        f"idle {_percent(e.idle_fraction)}"
        for e in (summary.estimates if summary.missing_ranks or summary.steps.lacks_much else ())
    ]


def _evidence(summary: Summary, paste: Paste) -> list[tuple[str, str]]:
    """Where an imbalanced run is imbalanced; and the command that tells more about the verdict."""
    verdict, loss = summary.verdict.verdict, summary.loss
    # Of a time that active experts set, tokens do not show who waits for whom.
    waits = Driver.ACTIVE_EXPERTS not in _drivers(summary.cost)
    found = []
    if verdict == "imbalanced":
        known = [layer for layer in summary.layers if layer.balancedness is not None]
        worst = sorted(known, key=lambda layer: layer.balancedness or 0.0)[:SHOWN_WORST]
        if len(worst) > 1:
            layers = _first_in_full([(la.layer, figure(la.balancedness)) for la in worst], "balancedness {}")
            found.append(("layers", f"least balanced{'' if waits else ' in tokens'}: {layers}"))
        if loss is not None and loss.tokens and len(loss.ranks) > 1:
            shares = [(r.rank, _percent(r.share, 0)) for r in loss.ranks[:SHOWN_WORST] if r.share]
            ranks = _first_in_full(shares, "{} of the excess tokens: those above the mean rank's")
            found.append(("ranks", f"{'the others wait for' if waits else 'most tokens:'} rank {ranks}"))
    if summary.rollup is not None:
        # The others read steps; where none is kept, they have nothing to say.
        return [*found, *_summed_evidence(summary.rollup)]
    command = NEXT_COMMANDS.get(verdict)
    if command == "advise" and summary.hot_experts_tier != "full":
        return found  # without experts' loads there is nothing to replay
    return found if command is None else [*found, ("next", paste(command))]


def _summed_evidence(rollup: Rollup) -> list[tuple[str, str]]:
    """The layers that stay imbalanced, and their ranks, of loads summed per minute."""
    if rollup.summed is None or not rollup.summed.layers:
        return []
    worst = rollup.summed.layers[:SHOWN_WORST]
    layers = _first_in_full([(la.layer, figure(la.balancedness)) for la in worst], "{}, summed per minute")
    ranks = listed([f"{la.worst_rank} in layer {la.layer}" for la in worst if la.worst_rank is not None])
    return [
        ("layers", f"least balanced: {layers}"),
        *([("ranks", f"most tokens: rank {ranks}")] if ranks else []),
    ]


def _first_in_full(figures: list[tuple[int, str]], meaning: str) -> str:
    """``14 (balancedness 0.715), 15 (0.716)``."""
    (number, value), *others = figures
    return listed([f"{number} ({meaning.format(value)})", *(f"{n} ({text})" for n, text in others)])


# ---- incidents


def told(incident: Incident, summary: Summary, clock: RunClock, paste: Paste = command_line) -> Told:
    """An incident in words. Its cost is compared with the median step."""
    beyond = lasts_beyond(incident, summary.steps)
    in_part = IN_PART if beyond and incident.cost.ms_per_step is not None else ""
    return Told(
        head=_head(incident, clock),
        parts=[
            *([("steps", beyond)] if beyond else []),
            ("cause", cause_sentence(incident, clock.label)),
            ("cost", _cost(incident, summary.cost) + in_part),
            ("end", _end(incident, summary, clock)),
            ("next", paste(next_command(incident))),
        ],
    )


def lasts_beyond(incident: Incident, selected: Completeness) -> str:
    """How an incident reaches beyond the selected steps; ``""`` if it does not."""
    first, last = selected.first, selected.last
    if first is None or last is None:
        return ""
    before, after = incident.first_step < first, incident.last_step > last
    steps = f"the selected {steps_text(first, last)}"
    if before and after:
        return f"began before {steps}, and ended after them"
    return f"began before {steps}" if before else f"ended after {steps}" if after else ""


def in_a_line(incident: Incident, clock: RunClock, selected: Completeness | None = None) -> str:
    """When and where an incident was, its cause, and its cost in ms if that is known.

    ``selected``: the steps that it is shown for; whether it reaches beyond them is added.
    """
    ms = incident.cost.ms_per_step
    cost = "" if ms is None else f"; {_per_step(ms)}"
    beyond = "" if selected is None else lasts_beyond(incident, selected)
    text = f"{_head(incident, clock)}; {cause_sentence(incident, clock.label)}{cost}"
    return f"{text}; {beyond}" if beyond else text


def _head(incident: Incident, clock: RunClock) -> str:
    first, last = incident.first_step, incident.last_step
    since, until = clock.time(first), clock.time(last)
    if since and since != until:
        since += f"{' to ' if ' ' in since else '-'}{until}"
    times = f"{since}, " if since else ""
    return f"{times}{steps_text(first, last)}: {where(incident)} at {incident.peak_imbalance:.1f}x the mean"


def _cost(incident: Incident, cost: RunCost) -> str:
    ms = incident.cost.ms_per_step
    if ms is None:
        tokens = incident.cost.tokens_per_step
        # Steps can be less balanced, and have so much less to do that the slowest rank has less, too.
        more = "more" if tokens > -0.5 else "fewer"
        return f"{abs(tokens):,.0f} {more} tokens per step on the slowest rank than usual; not known in ms"
    value, step = _per_step(ms), cost.step_ms_p50
    if ms.low > 0:
        share = f", {_percent(ms.estimate / step)} of the step" if step else ""
        total = ms.estimate * (incident.last_step + 1 - incident.first_step)
        value += f"{share}, {_time_text(total)} in total"
    if step and ms.high < EXPLAINS_LITTLE * step:
        value += f"; too little to explain a noticeably slower engine, so also look elsewhere: {ELSEWHERE}"
    return value


def _per_step(ms: Milliseconds) -> str:
    if ms.low <= 0:
        most = f", at most {milliseconds(ms.high)} per step" if ms.high > 0 else ""
        return f"no measurable cost{most}"
    text = milliseconds(ms.estimate, ms.low, ms.high, sign=True)
    return text.replace(" ms (", " ms per step while it lasted (95% CI ")


def _time_text(ms: float) -> str:
    """``298 ms``, ``1.96 s``, ``5.0 min``."""
    if ms < 1e3:
        return milliseconds(ms)
    return f"{ms / 1e3:.2f} s" if ms < 10e3 else duration(ms / 1e3)


def _end(incident: Incident, summary: Summary, clock: RunClock) -> str:
    ended, expert = incident.ended_by, incident.cause.expert
    if ended is None:
        near = (change.first_step - incident.last_step for change in summary.rearrangements)
        if incident.cause.kind == "loads_retired" and any(abs(apart) <= AT_ITS_END for apart in near):
            return "not known: experts' loads are no longer kept around the rearrangement at its end"
        return f"still in progress at {clock.label(incident.last_step)}, the last step that was looked at"
    match ended.kind:
        case "rearrangement":
            text = f"the rearrangement at {clock.label(ended.step)}"
            if expert is not None and ended.replicas is not None:
                text += f" gave the expert {plural(ended.replicas, 'replica')}"
            return f"{text}{_its_pause(ended.step, summary)}"
        case "traffic":
            return f"the traffic changed back at {clock.label(ended.step)}"
        case "rank_back":
            return f"the rank came back at {clock.label(ended.step)}"
        case _:
            return f"still in progress when the recording ends, at {clock.label(ended.step)}"


def _its_pause(step: int, summary: Summary) -> str:
    """How long the rearrangement at a step paused the engine, if measurably."""
    for change, pause in zip(summary.rearrangements, summary.pauses, strict=True):
        if change.first_step <= step <= change.last_step and pause is not None and pause.low > 0:
            return f"; it paused the engine for {_time_text(pause.estimate)}"
    return ""


def next_command(incident: Incident) -> str:
    """The command that shows more of an incident."""
    within = f"--steps {incident.first_step}-{incident.last_step}"
    layer = incident.layer if incident.layer is not None else incident.cause.layer
    match incident.cause.kind:
        case "rank_lost":
            return "check"
        case "rearrangement" | "eplb_stopped":
            return "rearrangements"
        case "few_tokens":  # not the choice of experts, and it can be found without their loads
            return f"ranks {within}"
        case "traffic_shift":
            return f"experts {within}"
        case _:
            return f"ranks {within}" if layer is None else f"layer {layer} {within}"
