"""The sentences that `summary` and the report begin with, for every verdict, incident and end."""

from __future__ import annotations

import calendar
import io
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from helpers import load_of, map_of, open_writer

from eplb_analyze import open_run
from eplb_analyze.analysis.cost import PhaseCost
from eplb_analyze.analysis.incidents import Cause, CauseKind, EndedBy, EndKind, Incident, IncidentCost
from eplb_analyze.analysis.milliseconds import Milliseconds
from eplb_analyze.analysis.pauses import Gap, LongGaps
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.analysis.summary_report import Summary, VerdictKind
from eplb_analyze.cli.views.summary import MARKS, render
from eplb_analyze.metrics.cost import CostStatus, Driver
from eplb_analyze.metrics.losses import RankLoss
from eplb_analyze.reader.clock import RunClock
from eplb_analyze.report.answer import TITLES, answer_of, cost_sentence, in_a_line, told
from eplb_analyze.report.sentences import cost as cost_tile

HOT = Incident(
    layer=12,
    layers=(12,),
    ranks=(14,),
    first_step=10,
    last_step=19,
    since="2026-11-26T03:12:04Z",
    until="2026-11-26T03:31:58Z",
    peak_imbalance=2.2,
    usual_imbalance=1.1,
    cause=Cause("expert_hot", 77, 12, 1.0, 11.0, 1),
    ended_by=EndedBy("rearrangement", 20, 10),
    cost=IncidentCost(Milliseconds(0.9, 0.7, 1.1), 500.0),
)


SHIFT = replace(HOT, cause=Cause("traffic_shift"), ended_by=EndedBy("traffic", 20, None))


class Clock(RunClock):
    """Steps 10 to 19 begin at 03:12:04 and take a minute each; no other step's time is known."""

    def __init__(self, *, known: bool = True) -> None:
        super().__init__("r", [], timed=known)

    def unix_ns(self, step: int) -> int | None:
        return (START + 60 * (step - 10)) * 10**9 if self._timed and 10 <= step < 20 else None


START = calendar.timegm((2026, 11, 26, 3, 12, 4))
CLOCK = Clock()


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    root = tmp_path_factory.mktemp("run")
    with open_writer(root, scope="global") as writer:
        for step in range(40):
            writer.record(step, load_of(step), map_of(step // 20))
    # How long the writer's test took between steps is chance.
    return replace(summarize(open_run(root)), pauses=[None], long_gaps=None)


def measured(summary: Summary, share: float = 0.03) -> Summary:
    ms = Milliseconds(24 * share, 23 * share, 25 * share)
    cost = replace(
        summary.cost,
        status=CostStatus.MEASURED,
        basis="host",
        ms_per_step=ms,
        share_of_step=Milliseconds(share, 23 / 24 * share, 25 / 24 * share),
        step_ms_p50=24.0,
    )
    return replace(summary, cost=cost)


def balanced(summary: Summary, mean: float, **changes: Any) -> Summary:
    spread = replace(summary.spreads["balancedness"], mean=mean, p5=mean - 0.01)
    return replace(summary, spreads={**summary.spreads, "balancedness": spread}, **changes)


@pytest.mark.parametrize(
    ("mean", "changes", "verdict"),
    [
        (0.96, {}, "balanced"),
        (0.96, {"incidents": [HOT]}, "mostly_balanced"),
        (0.94, {}, "mostly_balanced"),
        (0.8, {}, "mostly_balanced"),
        (0.79, {}, "imbalanced"),
        (0.96, {"acted": False}, "eplb_never_acted"),
        (0.96, {"acted": False, "not_due": "Not due."}, "balanced"),
        (0.96, {"acted": None}, "balanced"),
        (0.96, {"present_ranks": [], "acted": False}, "incomplete_data"),
    ],
)
def test_first_rule_that_applies_gives_the_verdict(
    summary: Summary, mean: float, changes: dict[str, Any], verdict: str
) -> None:
    given = balanced(summary, mean, **changes)
    assert given.verdict.verdict == verdict
    answer = answer_of(given, CLOCK)
    assert answer.title == TITLES[verdict]
    assert answer.figures == f"balancedness {mean:.3f} (5th percentile {mean - 0.01:.3f})"
    assert given.to_json()["verdict"] == {"verdict": verdict, "rule": given.verdict.rule}


def test_run_whose_imbalance_costs_a_twentieth_of_its_time_is_imbalanced(summary: Summary) -> None:
    assert measured(balanced(summary, 0.96), 0.06).verdict.verdict == "imbalanced"
    assert measured(balanced(summary, 0.96), 0.04).verdict.verdict == "balanced"


def with_drivers(given: Summary, *drivers: Driver | None) -> Summary:
    of = PhaseCost(CostStatus.MEASURED, "", 100, 100, None, None, None, None, None, "")
    phases = {str(i): replace(of, driver=driver) for i, driver in enumerate(drivers)}
    return replace(given, cost=replace(given.cost, phases=phases))


def test_share_that_placement_can_remove_is_of_tokens_and_not_of_time(summary: Summary) -> None:
    def last_sentence(*drivers: Driver | None) -> str:
        assert summary.loss is not None
        given = measured(balanced(summary, 0.7, loss=replace(summary.loss, persistent_share=0.4)))
        return answer_of(with_drivers(given, *drivers), CLOCK).sentences[-1]

    for drivers in ((Driver.TOKENS,), (None,), (Driver.ACTIVE_EXPERTS, Driver.TOKENS)):
        assert last_sentence(*drivers) == (
            "Better placement can remove at most 40% of the imbalance in tokens; the rest varies from step to"
            " step."
        )
    assert last_sentence(Driver.ACTIVE_EXPERTS) == (
        "Steps wait for the rank with the most active experts: balancing tokens alone saves nothing."
    )


def test_no_rank_waits_for_tokens_if_active_experts_set_the_time(summary: Summary) -> None:
    assert summary.loss is not None
    ranks = [RankLoss(2, 46.0, 0.46), RankLoss(1, 40.0, 0.4)]
    given = measured(balanced(summary, 0.7, loss=replace(summary.loss, tokens=100.0, ranks=ranks)))

    def evidence(*drivers: Driver | None) -> dict[str, str]:
        return dict(answer_of(with_drivers(given, *drivers), CLOCK).evidence)

    shares = "rank 2 (46% of the excess tokens: those above the mean rank's), 1 (40%)"
    assert evidence(Driver.TOKENS)["ranks"] == f"the others wait for {shares}"
    assert evidence(Driver.TOKENS)["layers"].startswith("least balanced: ")
    assert evidence(Driver.ACTIVE_EXPERTS)["ranks"] == f"most tokens: {shares}"
    assert evidence(Driver.ACTIVE_EXPERTS)["layers"].startswith("least balanced in tokens: ")


@pytest.mark.parametrize(
    ("share", "sentence"),
    [
        # The bounds are 23/24 and 25/24 of the share.
        (
            0.03,
            "Expert imbalance does not explain a slow engine here: it costs at most 3.1% of the step time.",
        ),
        (0.049, None),
        (0.1, None),
        (0.12, "Expert imbalance costs a large part of the step time: at least 11.5%."),
    ],
)
def test_first_sentence_says_whether_imbalance_explains_a_slow_engine(
    summary: Summary, share: float, sentence: str | None
) -> None:
    first, second, *_ = answer_of(measured(summary, share), CLOCK).sentences
    assert (first if second.startswith("Imbalance costs") else None) == sentence


def test_small_cost_of_the_run_does_not_hide_a_costly_incident(summary: Summary) -> None:
    def judged(ms: float) -> bool:
        incident = replace(HOT, cost=IncidentCost(Milliseconds(ms, ms, ms), 500.0))
        given = replace(measured(summary), incidents=[incident])
        return answer_of(given, CLOCK).sentences[0].startswith("Expert imbalance does not explain")

    # A step takes 24 ms.
    assert judged(1.1)
    assert not judged(1.3)


def test_nothing_is_said_of_a_slow_engine_if_most_steps_are_left_out(summary: Summary) -> None:
    given = measured(summary)
    assert any(text.startswith("Expert imbalance") for text in answer_of(given, CLOCK).sentences)
    given = replace(given, present_ranks=[])
    assert not any(text.startswith("Expert imbalance") for text in answer_of(given, CLOCK).sentences)


def test_phases_without_a_measured_cost_are_not_averaged_into_one_that_has(summary: Summary) -> None:
    def phase(
        status: CostStatus, steps: int, ms: Milliseconds | None, step: float, why: str = ""
    ) -> PhaseCost:
        share = None if ms is None else Milliseconds(ms.estimate / step, ms.low / step, ms.high / step)
        return PhaseCost(status, why, steps, steps, ms, share, step, None, None, "")

    why = "89 steps with a usable time, but 100 are needed"
    phases = {
        "large": phase(CostStatus.NOT_IDENTIFIABLE, 89, None, 90.0, why),
        "medium": phase(CostStatus.NO_MEASURABLE_COST, 331, Milliseconds(0.459, 0.0, 2.03), 38.1),
        "small": phase(CostStatus.MEASURED, 1580, Milliseconds(0.35, 0.34, 0.36), 7.2),
    }
    given = measured(summary, 0.023)
    given = replace(given, cost=replace(given.cost, phases=phases))
    expected = (
        "In small (79% of the steps), imbalance costs 0.35 ms of each 7.20 ms step, 4.9% (95% CI 0.34 to "
        "0.36 ms). In medium (17%), imbalance costs between 0 and 2.03 ms of 38.1 ms, at most 5.3%. In large "
        f"(4%), the cost is not measured: {why}. Measured by times between steps."
    )
    assert cost_sentence(given.cost) == expected
    judged, second, *_ = answer_of(given, CLOCK).sentences
    assert second == expected
    assert judged == (
        "Expert imbalance does not explain a slow engine in small: it costs at most 5.0% of the step time."
    )
    assert cost_tile(given)["tile"] == [
        "0.35 ms",
        "of each 7.20 ms step, 4.9% (95% CI 0.34 to 0.36), in small",
    ]
    none = replace(
        given.cost, status=CostStatus.NO_MEASURABLE_COST, phases=phases | {"small": phases["medium"]}
    )
    assert cost_sentence(none).startswith("In medium (")


def test_every_verdict_and_cause_has_words() -> None:
    assert set(get_args(VerdictKind)) | {"rank_lost"} == set(TITLES)
    assert set(get_args(CauseKind)) == set(MARKS)


def test_cost_is_given_with_its_share_and_basis(summary: Summary) -> None:
    known = cost_sentence(measured(summary).cost)
    assert known.startswith("Imbalance costs 0.72 ms of each 24.0 ms step, 3.0")
    assert known.endswith("(95% CI 0.69 to 0.75 ms), measured by times between steps.")
    unknown = cost_sentence(summary.cost)
    assert unknown == "The cost of imbalance is not known: fewer than 100 steps are complete."


def test_hot_expert_is_told_with_cause_cost_end_and_next_command(summary: Summary) -> None:
    found = told(HOT, measured(summary), CLOCK)
    assert found.head == "03:12:04-03:21:04, steps 10-19: layer 12, rank 14 at 2.2x the mean"
    parts = dict(found.parts)
    assert parts["cause"] == "expert 77 rose from 1.0x to 11x the mean load and had 1 replica"
    assert parts["cost"].startswith("+0.9 ms per step while it lasted (95% CI +0.7 to +1.1), 3.8")
    # The upper bound is 1.1 of 24 ms.
    assert parts["cost"].endswith(
        "of the step, 9.00 ms in total; too little to explain a noticeably slower engine, so also look"
        " elsewhere: queueing, KV cache, prefill, network"
    )
    larger = replace(HOT, cost=IncidentCost(Milliseconds(150.0, 140.0, 160.0), 500.0))
    assert dict(told(larger, measured(summary), CLOCK).parts)["cost"].endswith("of the step, 1.50 s in total")
    assert parts["end"] == "the rearrangement at step 20 gave the expert 10 replicas"
    assert parts["next"] == "eplb-analyze layer 12 --steps 10-19"
    beyond = replace(larger, last_step=60)  # of 40 steps
    in_part = "; by the times of the selected steps, so in the whole run it can differ a little"
    assert dict(told(beyond, measured(summary), CLOCK).parts)["cost"].endswith(f"in total{in_part}")
    unknown = replace(beyond, cost=IncidentCost(None, 500.0))
    assert dict(told(unknown, measured(summary), CLOCK).parts)["cost"].endswith("not known in ms")


def test_pauses_of_rearrangements_are_summed_and_named_where_they_end_an_incident(summary: Summary) -> None:
    (change,) = summary.rearrangements
    at = change.first_step
    assert at == 20

    def text(*pauses: Milliseconds | None, seconds: float | None = 10.0) -> list[str]:
        given = replace(
            summary, rearrangements=[change] * len(pauses), pauses=[*pauses], duration_seconds=seconds
        )
        return [sentence for sentence in answer_of(given, CLOCK).sentences if "paused" in sentence]

    one = Milliseconds(298.0, 294.0, 302.0)
    how = "`eplb-analyze rearrangements` shows whether that pays."
    assert text(None) == text() == []
    assert text(one) == [f"1 rearrangement paused the engine for 298 ms (3.0% of the run); {how}"]
    assert text(*[one] * 9, None) == [
        "Rearrangements do cost time: 9 rearrangements paused the engine for 2.68 s in all (26.8% of the "
        "run); of 1 more it is not known;"
        f" {how}"
    ]
    assert text(one, seconds=None) == [f"1 rearrangement paused the engine for 298 ms; {how}"]
    assert text(Milliseconds(1.0, 0.0, 3.0)) == [
        "1 rearrangement paused the engine for no measurable time (at most 3.00 ms)."
    ]
    ends = [
        dict(told(HOT, replace(summary, pauses=[pause]), CLOCK).parts)["end"]
        for pause in (one, None, Milliseconds(1.0, 0.0, 3.0))
    ]
    gave = "the rearrangement at step 20 gave the expert 10 replicas"
    assert ends == [f"{gave}; it paused the engine for 298 ms", gave, gave]


def test_long_gaps_without_a_rearrangement_are_named(summary: Summary) -> None:
    def text(gaps: LongGaps | None) -> list[str]:
        given = answer_of(replace(summary, long_gaps=gaps), CLOCK).sentences
        return [sentence for sentence in given if "gap" in sentence]

    rest = "the median is 3.90 ms. Whether the engine was idle or stalled is not known."
    assert text(None) == []
    assert text(LongGaps(1, 769.0, [Gap(11, 769.0)], 3.9)) == [
        f"Longest gap between steps without a rearrangement: 769 ms before step 11 (03:13:04); {rest}"
    ]
    many = LongGaps(50, 9000.0, [Gap(11, 769.0), Gap(505, 700.0), Gap(4, 600.0)], 3.9)
    assert text(many) == [
        "Longest gaps between steps without a rearrangement: 769 ms before step 11 (03:13:04), 700 ms"
        f" before step 505, 600 ms before step 4 (50 such gaps, 9.00 s in all); {rest}"
    ]


def test_incident_whose_interval_contains_zero_has_no_measurable_cost(summary: Summary) -> None:
    unsure = replace(HOT, cost=IncidentCost(Milliseconds(0.03, -0.0019, 0.11), 500.0))
    cost = dict(told(unsure, measured(summary), CLOCK).parts)["cost"]
    assert cost.startswith("no measurable cost, at most 0.11 ms per step; too little to explain ")
    assert in_a_line(unsure, CLOCK).endswith("; no measurable cost, at most 0.11 ms per step")


def test_incident_in_a_line_has_its_cause_and_its_cost_in_ms_if_known() -> None:
    line = in_a_line(HOT, CLOCK)
    head = "03:12:04-03:21:04, steps 10-19: layer 12, rank 14 at 2.2x the mean; "
    cause = "expert 77 rose from 1.0x to 11x the mean load and had 1 replica"
    assert line.startswith(f"{head}{cause}; +0.9 ms per step while it lasted (95% CI +0.7 to +1.1)")
    assert in_a_line(replace(HOT, cost=IncidentCost(None, 1234.0)), CLOCK) == head + cause


@pytest.mark.parametrize("kind", get_args(CauseKind))
@pytest.mark.parametrize("layer", [None, 12])
def test_every_cause_is_told_without_unknown_figures(summary: Summary, kind: Any, layer: int | None) -> None:
    bare = replace(
        HOT, layer=layer, ranks=(), since=None, until=None, cause=Cause(kind), ended_by=None,
        cost=IncidentCost(None, 1234.0),
    )  # fmt: skip
    found = told(bare, summary, Clock(known=False))
    text = " ".join([found.head, *(part for _, part in found.parts)])
    assert "None" not in text
    assert "1,234 more tokens per step" in text
    assert found.head.startswith("steps 10-19: layer")


@pytest.mark.parametrize("kind", get_args(EndKind))
def test_every_end_names_its_step(summary: Summary, kind: Any) -> None:
    found = dict(told(replace(HOT, ended_by=EndedBy(kind, 4711)), summary, CLOCK).parts)
    assert "4711" in found["end"]


@pytest.mark.parametrize("width", [80, 160])
def test_answer_fits_the_terminal_and_commands_are_not_broken(summary: Summary, width: int) -> None:
    from rich.console import Console

    given = measured(replace(summary, incidents=[HOT, replace(HOT, cause=Cause("rearrangement"))] * 2))
    out = io.StringIO()
    render(Console(file=out, width=width, highlight=False, markup=False), given, CLOCK, full=True)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "4 incidents" in lines
    assert sum("next   eplb-analyze layer 12 --steps 10-19" in line for line in lines) == 2
    assert any(line.lstrip().startswith("^hot expert") for line in lines)


def test_summary_says_which_departures_it_does_not_list(summary: Summary) -> None:
    from rich.console import Console

    def text(given: Summary) -> str:
        render(Console(file=(out := io.StringIO()), width=160), given, CLOCK, full=False)
        return out.getvalue()

    assert "no usual balance" not in text(summary)
    assert "not examined" not in text(summary)
    shown = text(replace(summary, unexamined_departures=3, restless_layers=2))
    assert "and 3 smaller departures from the usual balance, not examined" in shown
    assert f"2 of {summary.run.num_layers} layers have no usual balance" in shown


def test_summary_without_a_step_shows_no_figures(tmp_path: Path) -> None:
    open_writer(tmp_path, scope="global").close()
    answer = answer_of(summarize(open_run(tmp_path)), CLOCK)
    assert (answer.title, answer.figures) == ("INCOMPLETE DATA", "")
    assert answer.sentences == ["No step is complete."]


@pytest.mark.parametrize(("layers", "which"), [((12,), "this layer"), ((3, 12, 40), "these layers")])
def test_shift_of_traffic_names_no_more_layers_than_it_was_in(
    summary: Summary, layers: tuple[int, ...], which: str
) -> None:
    one = replace(SHIFT, layers=layers, layer=layers[0] if len(layers) == 1 else None)
    text = f"{told(one, summary, CLOCK)}"
    assert f"the shares of several experts of {which} shifted at the same time" in text


@pytest.mark.parametrize(
    ("tokens", "text"), [(500.4, "500 more"), (0.0, "0 more"), (-0.4, "0 more"), (-38.2, "38 fewer")]
)
def test_tokens_of_incident_without_cost_have_no_sign(summary: Summary, tokens: float, text: str) -> None:
    one = replace(SHIFT, cost=IncidentCost(None, tokens))
    assert f"{text} tokens per step on the slowest rank than usual" in f"{told(one, summary, CLOCK)}"
