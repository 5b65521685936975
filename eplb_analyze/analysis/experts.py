"""The figures of `experts`: which logical experts are hot, always or in bursts, cold or dead.

Loads are summed over the steps of a window while they are still physical, and only those sums are
folded to logical experts: so a long run costs little more than decoding it.
"""

from __future__ import annotations

import itertools
from dataclasses import field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.analysis.expert_windows import ExpertWindows
from eplb_analyze.errors import DumpError
from eplb_analyze.json_report import remembers_run
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.configurations import LastConfiguration, Sums, SumsReport
from eplb_analyze.reader.placements import fold, holdings, replicas, sums_between
from eplb_analyze.reader.readings import Reading
from eplb_analyze.reader.run import Run
from eplb_analyze.text import listed, plural
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int32, Int64, Shape
from eplb_dump.format.schema import EMPTY_SLOT, Tier

if TYPE_CHECKING:  # `report` shows no frame
    import polars as pl

WINDOW, HOT_FACTOR = 100, 2.0
#: An expert that is hot in this share of the windows is always hot.
ALWAYS = 0.9
#: With fewer tokens per expert and window, twice the mean is often random.
FEW_TOKENS = 30


@frozen
class Overlap:
    """The mean share of a layer's hot set that is still in it ``lag`` windows later."""

    #: Windows between the two hot sets.
    lag: int
    #: The share of a hot set that is in the other one.
    overlap: float
    #: The number of (layer, pair of windows) averaged.
    pairs: int


@frozen
class ExpertReport(SumsReport):
    """``experts`` has a row a layer and logical expert; docs/cli.md describes its columns."""

    layer: int | None
    window: int
    #: How many windows the steps were cut into.
    windows: int
    #: An expert is hot in a window in which it has this many times the mean.
    hot_factor: float
    #: Whether replicas are judged by the loads of all steps, not by those under the placement they are in.
    all_placements: bool
    #: The first step of the newest placement that replicas are judged in; None if no placement is known.
    placement_first_step: int | None
    #: Tokens on slots of which the expert is not known.
    unknown_tokens: float
    layers_without_placement: list[int]
    #: The size of a layer's hot set, and what two such sets picked by chance have in common.
    hot_set: int
    chance_overlap: float
    drift: list[Overlap]
    #: The columns of ``experts``; -1 and NaN where it has null.
    columns: dict[str, npt.NDArray[Any]] = field(repr=False)
    notes: list[str]

    @cached_property
    def experts(self) -> pl.DataFrame:
        """Logical experts."""
        import polars as pl

        return pl.DataFrame(self.columns).with_columns(
            pl.col("first_hot_step", "last_hot_step").replace(-1, None),
            pl.col("burstiness", "due_replicas", "placement_times_mean", "worst_replica").fill_nan(None),
        )

    @property
    def counts(self) -> dict[str, int]:
        """How many experts have each verdict and flag."""
        columns = self.columns
        verdicts = {v: int((columns["verdict"] == v).sum()) for v in ("always", "bursts", "never")}
        flags = ("cold", "dead", "under_replicated", "over_replicated", "replicas_on_one_rank")
        rows = {"experts": len(columns["logical"])}
        return {**rows, **verdicts, **{flag: int(columns[flag].sum()) for flag in flags}}

    @property
    def hot(self) -> pl.DataFrame:
        """Those that are hot in some window, the hottest first."""
        return self.experts.filter(self.experts["verdict"] != "never").sort(
            "times_mean", "layer", "logical", descending=[True, False, False]
        )

    @property
    def cold(self) -> pl.DataFrame:
        """Those that are cold over all steps, dead ones included, the coldest first."""
        return self.experts.filter("cold").sort("times_mean", "layer", "logical")

    def to_json(self, *, hot: bool = True, cold: bool = True, rows: bool = True) -> dict[str, Any]:
        """All experts, or only the hot or cold ones; or none, without ``rows``."""
        shown: Any = [] if not rows else self.experts if hot == cold else self.hot if hot else self.cold
        drift = {"hot_set": self.hot_set, "chance_overlap": self.chance_overlap, "lags": self.drift}
        return self.document(
            {
                "layer": self.layer,
                #: The source of the figures: experts' loads, always `full`.
                "tier": Tier.FULL.value,
                "steps": self.steps,
                "first_step": self.first_step,
                "last_step": self.last_step,
                "recorded": self.recorded,
                "missing_ranks": self.missing_ranks,
                "window": self.window,
                "windows": self.windows,
                "hot_factor": self.hot_factor,
                "all_placements": self.all_placements,
                "placement_first_step": self.placement_first_step,
                "counts": self.counts,
                #: How much of a layer's hot set stays hot.
                "drift": drift,
                "unknown_tokens": self.unknown_tokens,
                "layers_without_placement": self.layers_without_placement,
                "experts": shown,
                "notes": self.notes,
            }
        )


@remembers_run
def expert_report(
    run: Run,
    layer: int | None = None,
    steps: tuple[int, int] | None = None,
    *,
    window: int = WINDOW,
    hot_factor: float = HOT_FACTOR,
    all_placements: bool = False,
) -> ExpertReport:
    """The experts of a run, or of one layer, by the model's layer number.

    Args:
        steps: a half-open range of steps; default all.
        window: so many complete steps are one window.
        hot_factor: an expert is hot in a window with this many times the layer's mean, or more.
        all_placements: judge the replicas of the last placement by the loads of all steps; default by the
            loads since that placement.

    Raises:
        NotInDumpError: the dump has no such layer or step.
        DumpError: no step that some rank recorded, or no placement, is in the range.
    """
    if window < 1 or not hot_factor > 1:
        raise ValueError("window must be at least 1, and hot_factor must be greater than 1")
    index = None if layer is None else run.layer_index(layer)

    def read() -> ExpertReport:
        # Each time: steps may be thinned while they are read.
        with_loads = run.with_loads()
        sums = expert_sums(with_loads, index, window, hot_factor, all_placements)
        sums.add_all(steps, estimate=True)
        return expert_report_of(with_loads, layer, *sums.result(steps))

    return run.retry_without_damaged(read)


def expert_sums(
    run: Run,
    index: int | None = None,
    window: int = WINDOW,
    hot_factor: float = HOT_FACTOR,
    all_placements: bool = False,
) -> LastConfiguration[ExpertSums]:
    """What :func:`expert_report` is made of, without any block yet; ``index``: of the layer."""
    first, last = (0, run.info.num_layers) if index is None else (index, index + 1)

    def start(shape: Shape) -> ExpertSums:
        experts = run.history.num_experts(run.info.num_logical_experts, last)[first:]
        windows = ExpertWindows(window, hot_factor, experts)
        return ExpertSums(run, shape, range(first, last), experts, windows, all_placements)

    return LastConfiguration(run, start)


def expert_report_of(
    run: Run, layer: int | None, sums: ExpertSums, whole: Completeness, notes: list[str]
) -> ExpertReport:
    """:func:`expert_report` of sums already made. Raises DumpError if no placement is known in them."""
    notes = [*notes, *run.import_caveats("step_order", "earlier_placements")]
    windows = sums.windows
    windows.finish()
    numbers = [run.info.layers[i] for i in sums.layers]
    without = [n for n, slots in zip(numbers, sums.placed, strict=True) if slots is None]
    if len(without) == len(numbers):
        raise DumpError(
            f"{run.path}: no placement is known in these steps, so loads cannot be assigned to experts"
        )
    columns = sums.columns(run)
    unknown = run.count(sums.unknown.sum())
    if unknown:
        notes.append(f"{unknown:,} tokens went to slots without a known expert; no figure includes them")
    if without:
        notes.append(f"{plural(len(without), 'layer')} without a placement left out: {listed(without)}")
    tokens = float(sums.tokens.sum()) / run.info.token_replication
    per_window = tokens / max(1, len(columns["logical"]) * sums.recorded / min(windows.size, sums.recorded))
    if 0 < per_window < FEW_TOKENS:
        notes.append(
            f"an expert has {per_window:.1f} tokens in a window on average, so a burst may be random; "
            "a larger --window-steps is more reliable"
        )
    if windows.count < 2:
        notes.append(
            "there is only one window, so bursts cannot be detected; choose a smaller --window-steps"
        )
    if not sums.all_placements and sums.few_since_change:
        notes.append(
            f"replicas are judged by the loads since each layer's last rearrangement; some layers have "
            f"fewer than {FEW_TOKENS} tokens per expert since then, so the verdicts may be random"
        )
    counts = sums.experts.tolist()
    chance = [windows.hot_set(n) / n for n in counts]
    return ExpertReport(
        *sums.head(run, whole),
        layer=layer,
        window=windows.size,
        windows=windows.count,
        hot_factor=windows.hot_factor,
        all_placements=sums.all_placements,
        placement_first_step=sums.placement_first_step,
        unknown_tokens=unknown,
        layers_without_placement=without,
        hot_set=max(windows.hot_set(n) for n in counts),
        chance_overlap=chance[0] if len({*counts}) == 1 else sum(chance) / len(chance),
        drift=[Overlap(lag, total / pairs, pairs) for lag, (total, pairs) in windows.drift.items() if pairs],
        columns=columns,
        notes=notes,
    )


class ExpertSums(Sums):
    """Loads of some layers of one configuration, by logical expert, and by slot since the last change."""

    def __init__(
        self,
        run: Run,
        shape: Shape,
        layers: range,
        experts: Int64,
        windows: ExpertWindows,
        all_placements: bool,
    ) -> None:
        """``experts``: how many experts each layer has."""
        super().__init__(shape)
        self.layers, self.windows, self.experts = layers, windows, experts
        self.all_placements = all_placements
        self.tokens = np.zeros((len(layers), run.info.num_logical_experts), np.int64)
        #: Tokens on slots of which it is not known, or not true, that they held an expert.
        self.unknown = np.zeros(len(layers), np.int64)
        #: The placement in force at the last step, and the tokens on its slots since it came.
        self.placed: list[Int32 | None] = [None] * len(layers)
        self.slot_tokens = np.zeros((len(layers), shape.num_physical_experts), np.int64)
        self._history = run.history

    def _reading(self, block: Block) -> Reading:
        steps, experts = block.recorded, self.tokens.shape[1]
        bounds = self._bounds((self.recorded - len(steps)) % self.windows.size, len(steps))
        logical: Int64 = np.zeros((len(bounds) - 1, *self.tokens.shape), np.int64)
        by_period: list[list[Int64]] = [[] for _ in self.layers]
        unknown = np.zeros_like(self.unknown)

        def use(layer: int, load: npt.NDArray[Any]) -> None:
            i = layer - self.layers.start
            for slots, starts, sums in sums_between(load, steps, self._history.layer(layer), bounds):
                by_period[i].append(sums.sum(axis=0))
                folded = np.zeros((len(sums), experts), np.int64)
                if slots is not None and len(slots) == sums.shape[1]:
                    folded = fold(sums, slots, experts)
                unknown[i] += sums.sum() - folded.sum()
                logical[np.searchsorted(bounds, starts, side="right") - 1, i] += folded

        return Reading(use, lambda: (logical, by_period, unknown), self.layers)

    def _bounds(self, filled: int, count: int) -> list[int]:
        """Where windows begin and end in the next ``count`` steps, ``filled`` steps being in the open one."""
        return [0, *range(self.windows.size - filled, count, self.windows.size), count]

    def merge(self, block: Block, part: tuple[Int64, list[list[Int64]], Int64]) -> None:
        """The part: loads by logical expert between bounds ``[bounds - 1, layers, experts]``; of each layer,
        tokens by slot of each placement period ``[slots]``; and tokens of no known expert ``[layers]``.
        """
        steps = block.recorded
        logical, by_period, unknown = part
        self.tokens += logical.sum(axis=0)
        self.unknown += unknown
        for i, (layer, own) in enumerate(zip(self.layers, by_period, strict=True)):
            for (_, held), tokens in zip(self._history.layer(layer).periods(steps), own, strict=True):
                slots = held if held is not None and len(held) == len(tokens) else None
                if self.placed[i] is not slots:
                    self.placed[i] = slots
                    self.slot_tokens[i] = 0
                self.slot_tokens[i] += tokens
        bounds = self._bounds(self.windows.filled, len(steps))
        for load, (low, high) in zip(logical, itertools.pairwise(bounds), strict=True):
            self.windows.add(load, int(steps[low]), int(steps[high - 1]), high - low)

    @property
    def placement_first_step(self) -> int | None:
        """From when on the last placement of all layers is in force."""
        histories = [self._history.layer(i) for i in self.layers]
        since = [h.steps[at] for h in histories if (at := h.index_at(self.last_step)) >= 0]
        return max(self.first_step, *since) if since else None

    @property
    def few_since_change(self) -> bool:
        """Whether a layer's placement is so new that chance decides which expert is short of replicas."""
        means = self.slot_tokens.sum(axis=1) / self.experts
        changed = self.slot_tokens.sum(axis=1) < self.tokens.sum(axis=1)
        return bool((changed & (means < FEW_TOKENS)).any())

    def columns(self, run: Run) -> dict[str, npt.NDArray[Any]]:
        """Those of :class:`ExpertReport`: a row a layer whose placement is known and logical expert."""
        windows, logical = self.windows, self.tokens.shape[1]
        known = [i for i, slots in enumerate(self.placed) if slots is not None]
        tokens, experts = self.tokens[known], self.experts[known, np.newaxis]
        total = tokens.sum(axis=1, keepdims=True)

        def of_total(counts: Int64) -> npt.NDArray[np.float64]:
            """Rounded once, so that what is a whole number is one."""
            share: npt.NDArray[np.float64] = np.zeros(counts.shape)
            np.divide(counts, total, out=share, where=total > 0)
            return share

        persistence, hot = windows.persistence[known], windows.hot[known]
        shared = _shared(run, logical)
        now = [
            _replication(
                slots,
                self.slot_tokens[i],
                self.tokens[i] if self.all_placements else None,
                int(self.experts[i]),
                shared,
                self.shape,
            )
            for i, slots in self._known()
        ]
        verdict = np.where(hot == 0, "never", np.where(persistence >= ALWAYS, "always", "bursts"))
        columns = {
            "layer": np.repeat(np.array(run.info.layers, np.int32)[self.layers.start :][known], logical),
            "logical": np.tile(np.arange(logical, dtype=np.int32), len(known)),
            "tokens": tokens if run.info.token_replication == 1 else run.tokens(tokens),
            "share": of_total(tokens),
            "times_mean": of_total(tokens * experts),
            "peak_times_mean": windows.peak[known],
            "persistence": persistence,
            "verdict": verdict,
            "first_hot_step": windows.first_hot[known],
            "last_hot_step": windows.last_hot[known],
            "burstiness": windows.burstiness[known],
            "cold": (total > 0) & (tokens * experts * windows.hot_factor <= total),
            "dead": (total > 0) & (tokens == 0),
            **{name: np.array([columns[name] for columns in now]) for name in now[0]},
        }
        exists = (np.arange(logical) < experts).reshape(-1)
        return {name: values.reshape(-1)[exists] for name, values in columns.items()}

    def _known(self) -> list[tuple[int, Int32]]:
        return [(i, slots) for i, slots in enumerate(self.placed) if slots is not None]


def _replication(
    slots: Int32,
    tokens: Int64,
    judged: Int64 | None,
    experts: int,
    shared: npt.NDArray[np.bool_],
    shape: Shape,
) -> dict[str, npt.NDArray[Any]]:
    """Whether each logical expert has the replicas that it is worth, by the tokens on its slots.

    An expert that every rank holds cannot gain from another replica. A shared expert has a slot on each rank
    for other reasons than its load, so the others share only the remaining slots and tokens.

    Args:
        slots: the placement.
        tokens: on each slot since the placement is in force.
        judged: the tokens of each expert that its replicas are judged by; None: those on its slots.
        experts: how many the layer has.
        shared: the shared experts of the model.
    """
    logical = len(shared)
    copies = replicas(slots, logical)
    filled = np.flatnonzero(slots != EMPTY_SLOT)
    largest = np.zeros(logical, np.int64)
    np.maximum.at(largest, slots[filled], tokens[filled])
    total = np.zeros(logical, np.int64)
    np.add.at(total, slots[filled], tokens[filled])
    uneven = np.divide(
        largest * copies, total, out=np.full(logical, np.nan), where=(copies > 1) & (total > 0)
    )
    total = total if judged is None else judged
    on_rank = holdings(slots, shape.ep_size, logical)
    serving = on_rank.any(axis=1)
    everywhere = (on_rank[serving] > 0).all(axis=0)
    due = np.full(logical, np.nan)
    for pool in (np.ones(logical, np.bool_), ~shared):
        if total[pool].any():
            due[pool] = total[pool] * int(copies[pool].sum()) / int(total[pool].sum())
    times = total * experts / total.sum() if total.any() else np.full(logical, np.nan)
    return {
        "placement_times_mean": times,
        "replicas": copies,
        "due_replicas": due,
        # By a whole slot: that no placement can give a part of one is nobody's fault.
        "under_replicated": (due - copies >= 1) & ~everywhere,
        "over_replicated": (copies - due >= 1) & (copies > 1) & ~shared,
        "worst_replica": uneven,
        "replicas_on_one_rank": on_rank.max(axis=0) > 1,
    }


def _shared(run: Run, logical: int) -> npt.NDArray[np.bool_]:
    """Experts that each rank holds in every placement of every layer, of several: shared experts.

    Engines that fuse them into the all-to-all give each rank a copy for its own tokens. No load balancer
    does so in all layers.
    """
    shared = np.full(logical, len(run.history.layers) > 1)
    for history in run.history.layers.values():
        for ep_size, slots in zip(history.ep_sizes, history.slots, strict=True):
            held = holdings(slots, ep_size, logical) > 0
            shared &= held[held.any(axis=1)].all(axis=0)
    return shared
