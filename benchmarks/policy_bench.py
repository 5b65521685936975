"""What each policy gains with each dispatch and setting, on recorded and on synthetic routing.

    python -m benchmarks.policy_bench [--workload NAME=PATH ...] [--ep-size 8] [--out bench]

A workload is a recording, or a file that ``eplb-analyze import`` reads; such a file is imported as if expert
e were in slot e on ``--ep-size`` ranks, with its rows in time order. Synthetic workloads
(:mod:`benchmarks.routing`) need no file. ``replay_run`` replays every combination of policy, dispatch,
redundant slots per rank, and interval; the window is the interval. For each policy, the setting is chosen by
the first 60% of the steps, as in `advise`, and judged by the others.

``--out`` gets ``bench.md``, the table; ``bench.csv``, all rows; ``bench.html``, a page with both. ``--page``
replaces the table in a Markdown page.
"""

from __future__ import annotations

import argparse
import csv
import html
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from benchmarks.routing import FAMILIES, Shape, generate
from eplb_analyze import AnalyzeError, Choices, Replay, Run, Setting, UsageError, open_run, replay_run
from eplb_analyze.dispatch.named import DISPATCHES, LP, MEASURED
from eplb_analyze.metrics import bootstrap
from eplb_analyze.metrics.bootstrap import Interval, Ratio
from eplb_analyze.metrics.formulas import Float64
from eplb_analyze.policies.policy import ORACLE, POLICIES
from eplb_analyze.replay.judging import TRAINING
from eplb_analyze.replay.pricing import Objective
from eplb_analyze.replay.scores import TODAY
from eplb_analyze.replay.setting_run import Move
from eplb_analyze.replay.settings import FIXED, STATIC
from eplb_analyze.text import plural
from eplb_analyze.transfer.importers.import_dump import Options, import_dump
from eplb_dump.format.schema import SESSION_FILE

#: No engine dispatches like this, so no policy is shown with it.
IDEAL = ("random", "even", LP)
#: Settings whose balancedness differs by less are equally good; of these, the one that costs least is chosen.
EQUAL = 0.005
NO_EPLB, RECORDED = "no EPLB", "as recorded"
#: Of the table.
COLUMNS = (
    "workload", "policy", "dispatch", "redundant", "interval", "balancedness", "gain (95% CI)", "LP",
    "oracle", "moved",
)  # fmt: skip
BEGIN, END = "<!-- table of benchmarks.policy_bench -->", "<!-- end of the table -->"


@dataclass(frozen=True)
class Row:
    """A setting's figures in the steps that it is judged by. Balancedness: 1 is perfect."""

    workload: str
    policy: str
    #: ``any``: without replicas, all are the same.
    dispatch: str
    redundant: int
    interval: int | None
    #: Balancedness in the steps that settings are chosen by.
    chosen_by: float
    balancedness: float
    #: Balancedness less that without EPLB, and its 95% interval.
    gain: float
    gain_low: float
    gain_high: float
    #: Balancedness of the same placements if each step's tokens were split in the best way.
    lp: float | None
    #: Balancedness of as many slots, if each step were placed by its own loads.
    oracle: float | None
    rearrangements: int
    #: Expert weights that ranks fetched, per 1,000 steps.
    moved: float


@dataclass(frozen=True)
class Workload:
    """All rows of a workload, the one without EPLB first."""

    name: str
    about: str
    notes: list[str]
    rows: list[Row]


@dataclass(frozen=True)
class Grid:
    """What is replayed, in all combinations; and the number of redundant experts of a recording."""

    policies: Sequence[str] = (*POLICIES, ORACLE)
    dispatches: Sequence[str] = tuple(DISPATCHES)
    slots_per_rank: Sequence[int] = (0, 1, 2)
    intervals: Sequence[int] = (32, 128)

    def choices(self, run: Run) -> Iterator[Choices]:
        """One for each interval, because each has its own window."""
        experts, ranks = run.info.num_logical_experts, run.info.ep_size
        redundant = {-experts % ranks + each * ranks for each in self.slots_per_rank}
        redundant.add(run.info.num_physical_experts - experts)
        policies = [STATIC, *(name for name in self.policies if name != STATIC)]
        for interval in self.intervals:
            only = [interval]
            yield Choices(policies, sorted(redundant), only, only, None, only, self.dispatches)
            policies = [name for name in policies if name not in FIXED]


@dataclass(frozen=True)
class Scored:
    """A setting, with the sums of each column of :class:`~eplb_analyze.replay.scores.Scores`."""

    setting: Setting
    balancedness: Float64
    active: Float64
    moves: list[Move]

    def mean(self, part: slice) -> float:
        return float(self.balancedness[part].sum() / self.active[part].sum())


def bench(name: str, run: Run, grid: Grid) -> Workload:
    """Replay all settings of a grid."""
    replays = [replay_run(run, choices, objective=Objective.TOKENS) for choices in grid.choices(run)]
    first = replays[0]
    steps, end = first.scores.step, first.last_step + 1
    cut = int(TRAINING * len(steps))
    chosen_by, judged_by, split = slice(0, cut), slice(cut, None), int(steps[cut])
    settings = {each.setting: each for replay in replays for each in _settings(replay)}
    no_eplb = min(
        (each for each in settings.values() if each.setting.policy == STATIC),
        key=lambda each: each.setting.num_redundant_experts,
    )
    oracle = {
        setting.num_redundant_experts: own.mean(judged_by)
        for setting, own in settings.items()
        if setting.policy == ORACLE
    }

    def row(own: Scored) -> Row:
        setting, moves = own.setting, [move for move in own.moves if move.step >= split]
        more = Ratio((own.balancedness - no_eplb.balancedness)[judged_by], own.active[judged_by])
        gain = Interval.of(more.value or 0.0, bootstrap.resample(more, np.random.default_rng(bootstrap.SEED)))
        without_replicas = setting.dispatch == MEASURED
        bound = own if without_replicas else settings.get(replace(setting, dispatch=LP))
        return Row(
            name, setting.policy, "any" if without_replicas else setting.dispatch,
            setting.num_redundant_experts, setting.interval,
            own.mean(chosen_by), own.mean(judged_by), gain.value, gain.low, gain.high,
            None if bound is None else bound.mean(judged_by), oracle.get(setting.num_redundant_experts),
            len(moves), 1000 * sum(move.weights for move in moves) / (end - split),
        )  # fmt: skip

    rows = [replace(row(no_eplb), policy=NO_EPLB)]
    if first.today.moves or first.recorded.num_redundant_experts:
        today = Setting(RECORDED, first.recorded.num_redundant_experts, run.info.ep_size, None, None, None)
        sums = first.scores.balancedness[TODAY], first.scores.active[TODAY]
        rows.append(replace(row(Scored(today, *sums, first.today.moves)), dispatch=MEASURED, lp=None))
    rows += map(row, settings.values())
    about = (
        f"{plural(first.scored, 'step')}, {plural(run.info.num_layers, 'layer')}, "
        f"{run.info.num_logical_experts} experts on {plural(run.info.ep_size, 'rank')}"
    )
    return Workload(name, about, [*dict.fromkeys(note for each in replays for note in each.notes)], rows)


def _settings(replay: Replay) -> Iterator[Scored]:
    scores = replay.scores
    for outcome, row in zip(replay.outcomes, replay.rows, strict=True):
        assert outcome.setting is not None
        yield Scored(outcome.setting, scores.balancedness[row], scores.active[row], outcome.moves)


def best(rows: Sequence[Row]) -> Row:
    """The row that the first steps choose: of those as good as the best, fewest slots, then least often."""
    least = max(row.chosen_by for row in rows) - EQUAL
    return min(
        (row for row in rows if row.chosen_by >= least),
        key=lambda row: (row.redundant, -(row.interval or 0), -row.chosen_by),
    )


def table(workloads: Sequence[Workload]) -> list[list[str]]:
    """The cells: of each workload the baselines, then the best row of each policy, the best policy first.

    Policies with the same cells share a row. Only the first row of a workload names it.
    """
    out: list[list[str]] = []
    for workload in workloads:
        name = workload.name
        by_policy: dict[str, list[Row]] = {}
        for row in workload.rows:
            if row.dispatch not in IDEAL and row.policy not in (STATIC, ORACLE):
                by_policy.setdefault(row.policy, []).append(row)
        baselines = [by_policy.pop(name) for name in (NO_EPLB, RECORDED) if name in by_policy]
        chosen = [*map(best, baselines), *sorted(map(best, by_policy.values()), key=_order)]
        for cells, same in itertools.groupby(chosen, _cells):
            out.append([name, ", ".join(sorted(row.policy for row in same)), *cells])
            name = ""
    return out


def _order(row: Row) -> tuple[float, tuple[str, ...]]:
    return -round(row.balancedness, 3), _cells(row)


def _cells(row: Row) -> tuple[str, ...]:
    baseline = row.policy == NO_EPLB
    return (
        "–" if baseline else row.dispatch,
        str(row.redundant),
        "–" if row.interval is None else str(row.interval),
        f"{row.balancedness:.3f}",
        "–"
        if baseline
        else f"{row.gain:+.3f} ({row.gain_low:+.3f} to {row.gain_high:+.3f})".replace("-", "−"),
        "–" if row.lp is None else f"{row.lp:.3f}",
        "–" if row.oracle is None else f"{row.oracle:.3f}",
        f"{row.moved:,.0f}",
    )


def markdown(cells: list[list[str]]) -> str:
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page(workloads: Sequence[Workload], about: str) -> str:
    """A page that needs no other file."""
    names = [field.name for field in fields(Row)]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Policies, dispatches and settings</title>",
        "<style>body{font:15px/1.4 system-ui,sans-serif;margin:2rem auto;max-width:90rem;padding:0 1rem}",
        "table{border-collapse:collapse;margin:1rem 0;white-space:nowrap}",
        "th,td{padding:.15rem .6rem;text-align:right}",
        "th{border-bottom:2px solid #888;position:sticky;top:0;background:#fff}",
        "th:nth-child(-n+3),td:nth-child(-n+3){text-align:left}tr:nth-child(even){background:#f4f4f4}",
        "</style><h1>Policies, dispatches and settings</h1>",
        f"<p>{html.escape(about)}</p>",
        _html(COLUMNS, table(workloads)),
    ]
    for workload in workloads:
        notes = "".join(f"<li>{html.escape(note)}" for note in workload.notes)
        rows = [[_text(getattr(row, name)) for name in names] for row in workload.rows]
        parts.append(
            f"<details><summary>{html.escape(workload.name)}: {html.escape(workload.about)}; "
            f"all {len(rows)} rows</summary><ul>{notes}</ul>{_html(names, rows)}</details>"
        )
    return "\n".join(parts) + "\n"


def _html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}' for cell in cells)}"

    return f"<table>{line('th', head)}\n" + "\n".join(line("td", row) for row in rows) + "</table>"


def _text(value: object) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def put(page: Path, text: str) -> None:
    """Replace the table of a Markdown page."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page}: it has no line {BEGIN}, or no {END} after it; add both")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def recording(name: str, path: Path, ep_size: int, scratch: Path) -> Run:
    """Open a recording; import any other file into a folder of its own."""
    if any(path.rglob(SESSION_FILE)):
        return open_run(path)
    options = Options(model=name, ep_size=ep_size, placement="linear", ordered=True)
    try:
        import_dump(path, scratch, options=options)
    except UsageError as error:
        hint = "or `eplb-analyze import` it with more options, and name the new folder"
        raise UsageError(f"{error}; {hint}") from None
    return open_run(scratch)


def synthetic(family: str, seed: int, shape: Shape, ep_size: int, scratch: Path) -> Run:
    """Generate routing and import it as if it had been recorded without redundant experts."""
    routing = generate(family, seed, shape)
    file = scratch.with_suffix(".npz")
    np.savez(file, load=routing.load, num_tokens=routing.num_tokens, phase=routing.phase)
    return recording(family, file, ep_size, scratch)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual, shape = Grid(), Shape()
    parser.add_argument("--workload", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic workloads")
    parser.add_argument("--steps", type=int, default=shape.steps, help="of the synthetic workloads")
    parser.add_argument("--tokens", type=int, default=shape.tokens, help="of a synthetic step")
    parser.add_argument("--ep-size", type=int, default=8, help="of files and synthetic workloads")
    parser.add_argument("--policy", nargs="*", default=usual.policies)
    parser.add_argument("--dispatch", nargs="*", default=usual.dispatches, choices=usual.dispatches)
    parser.add_argument("--slots-per-rank", type=int, nargs="*", default=usual.slots_per_rank)
    parser.add_argument("--intervals", type=int, nargs="*", default=usual.intervals)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--page", type=Path, help="a Markdown page whose table is replaced")
    args = parser.parse_args()
    grid = Grid(args.policy, args.dispatch, args.slots_per_rank, args.intervals)
    shape = replace(shape, steps=args.steps, tokens=args.tokens)
    began, workloads = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:

        def add(name: str, run: Run) -> None:
            start = time.monotonic()
            workloads.append(bench(name, run, grid))
            print(f"{name}: {workloads[-1].about}; {time.monotonic() - start:.0f} s", file=sys.stderr)

        try:
            for number, each in enumerate(args.workload):
                name, _, path = each.partition("=")
                add(name, recording(name, Path(path), args.ep_size, Path(folder, str(number))))
            for family in args.families:
                scratch = Path(folder, family.replace("/", "-"))
                add(family, synthetic(family, args.seed, shape, args.ep_size, scratch))
        except AnalyzeError as error:
            sys.exit(f"policy_bench: {error}")
    text = markdown(table(workloads))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "bench.md").write_text(text, encoding="utf-8")
    with (args.out / "bench.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Row))
        writer.writerows(vars(row).values() for workload in workloads for row in workload.rows)
    count, took = sum(len(each.rows) for each in workloads), time.monotonic() - began
    about = f"{count} rows in {took:.0f} s, seed {args.seed}. docs/bench.md explains the columns."
    (args.out / "bench.html").write_text(page(workloads, about), encoding="utf-8")
    if args.page is not None:
        put(args.page, text)
    print(text, end="")
    print(about, file=sys.stderr)


if __name__ == "__main__":
    main()
