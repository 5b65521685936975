"""Tokens are conserved: each MoE layer of a step gets tokens × top-k, and `num_tokens` says how many."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from eplb_analyze.distinct import distinct
from eplb_analyze.errors import Finding
from eplb_analyze.metrics.formulas import Float64
from eplb_analyze.reader.run import Run
from eplb_analyze.sessions.segments import Segment
from eplb_analyze.text import listed, plural
from eplb_dump.format.journal import Int64
from eplb_dump.format.schema import Scope, Status

#: At least this share of the steps must agree on a number of tokens per token, to call the others wrong.
MAJORITY = 0.5


class Conservation:
    """Each layer's tokens in each complete step, added block by block; later ones can be merged into them."""

    def __init__(self) -> None:
        self._active: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._unequal: list[Int64] = []
        #: Where some layers got nothing in a whole block: ``(active layers, steps with tokens)``.
        self._partly: list[tuple[npt.NDArray[np.bool_], Int64]] = []
        #: ``[3, steps]``: step, stated tokens, tokens of a layer.
        self._stated: list[Int64] = []

    def add(self, steps: Int64, totals: Int64 | Float64, num_tokens: Int64) -> None:
        """Add complete steps.

        Args:
            steps: int64 ``[S]``.
            totals: recorded tokens over all slots ``[S, layers]``; floats must be equal where tokens are.
            num_tokens: what the writers state, int64 ``[S]``; -1 if one of them does not.
        """
        active = np.asarray(totals.any(axis=0))
        self._active = _either(self._active, active)
        highest = totals.max(axis=1, initial=0)
        lowest = (totals if active.all() else totals[:, active]).min(axis=1) if active.any() else highest
        self._unequal.append(steps[highest != lowest])
        if active.any() and not active.all():
            self._partly.append((active, steps[highest > 0]))
        # Where layers differ, their number of tokens is wrong in any case.
        stated = (num_tokens >= 0) & (highest == lowest)
        tokens = np.rint(highest).astype(np.int64)
        self._stated.append(np.stack([steps, num_tokens, tokens])[:, stated])

    def merge(self, later: Conservation) -> None:
        self._active = _either(self._active, later._active)
        self._unequal += later._unequal
        self._partly += later._partly
        self._stated += later._stated

    def findings(self, run: Run) -> Iterator[Finding]:
        """What contradicts conservation in sums over ranks or, if nothing does, in the ranks' own loads."""
        yield from self.findings_of_sums(run)
        if not any(True for _ in self.token_findings()):
            yield from self._rank_findings(run)

    def findings_of_sums(self, run: Run) -> Iterator[Finding]:
        """What contradicts conservation in the sums over ranks. Reads nothing."""
        # A layer that got tokens in another part of the run is an MoE layer.
        late = [steps for active, steps in self._partly if (self._active & ~active).any()]
        unequal = np.concatenate([np.empty(0, np.int64), *self._unequal, *late])
        if len(unequal):
            text = f"layers got different numbers of tokens in {steps_text(unequal)}; each step's sum "
            text += "over slots is tokens × top-k and the same for all layers of a model"
            yield Finding("error", "conservation", text)
        silent = np.flatnonzero(~self._active & self._active.any())
        # Without names, a layer without any token can be a dense one that the engine lists, too.
        if len(silent) and run.sessions[0].info.moe_layers is not None:
            numbers = listed([run.info.layers[index] for index in silent])
            which, names = (f"layers {numbers}", "them") if len(silent) > 1 else (f"layer {numbers}", "it")
            text = f"{which} never got a token, although the writer names {names} among the MoE layers: "
            text += "tokens are lost there, because all layers of a model get the same number of tokens"
            yield Finding("error", "conservation", text)
        yield from self.token_findings()

    def token_findings(self) -> Iterator[Finding]:
        """A layer's tokens over the stated tokens must be one constant: top-k × token replication."""
        yield from _token_findings(self._with_tokens())

    def _with_tokens(self) -> Int64:
        stated: Int64 = np.concatenate([np.empty((3, 0), np.int64), *self._stated], axis=1)
        return stated[:, (stated[1:] > 0).any(axis=0)]

    def _rank_findings(self, run: Run) -> Iterator[Finding]:
        """Ranks that contradict their own `num_tokens` in ways that cancel in the sums over ranks.

        Only a warning: an engine may split its tokens over ranks in other ways than it states. If it counts a
        token several times, the load of a rank has tokens of others, too, and nothing is known.
        """
        _, tokens, load = self._with_tokens()
        if run.scope is not Scope.LOCAL or run.info.token_replication > 1 or not (tokens > 0).any():
            return
        each, of = _constant(tokens, load)
        layer = int(np.argmax(self._active))
        odd: dict[int, list[int]] = defaultdict(list)
        judged = 0
        for session in run.sessions:
            for segment in filter(run.readable, session.segments):
                steps, stated, own = _own_tokens(segment, layer)
                judged += len(steps)
                odd[session.info.ep_rank] += steps[own * of != stated * each].tolist()
        if sum(map(len, odd.values())) > (1 - MAJORITY) * judged:
            return
        parts = [f"rank {rank} in {steps_text(steps)}" for rank, steps in sorted(odd.items()) if steps]
        if parts:
            text = f"ranks' own load is not their num_tokens × {each / of:g}, although the sums over ranks "
            yield Finding("warning", "num_tokens", f"{text}are: {listed(parts, 4)}")


def _either(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    return one | other if len(one) and len(other) else other if len(other) else one


def _own_tokens(segment: Segment, layer: int) -> tuple[Int64, Int64, Int64]:
    """A rank's recorded steps with a stated number of tokens, that number, and its tokens in a layer."""
    rows = segment.steps()
    rows = rows.select((rows.status == Status.RECORDED) & (rows.num_tokens >= 0))
    if segment.shape is None or layer >= segment.shape.num_moe_layers or not len(rows.step):
        return (np.empty(0, np.int64),) * 3
    with contextlib.closing(segment.rank_loads(layer, layer + 1)) as parts:
        first, load = next(parts)
    steps, here, there = np.intersect1d(rows.step, segment.load_steps(), return_indices=True)
    return steps, rows.num_tokens[here], load[layer - first][there].sum(axis=1)


def _constant(tokens: Int64, load: Int64) -> tuple[int, int]:
    """The most frequent ``load / tokens``, over steps with tokens, in lowest terms to compare it exactly."""
    some = tokens > 0
    divisor = np.gcd(load[some], tokens[some])
    pairs = np.stack([load[some] // divisor, tokens[some] // divisor])
    values, counts = np.unique(pairs, axis=1, return_counts=True)
    each, of = values[:, counts.argmax()].tolist()
    return each, of


def _token_findings(stated: Int64) -> Iterator[Finding]:
    """``stated``: ``[3, steps]``: step, stated tokens, tokens of a layer; at least one of them in each."""
    steps, tokens, load = stated
    if not len(steps):
        return
    some = tokens > 0
    if not some.any():
        yield Finding("error", "num_tokens", f"tokens although num_tokens is 0, in {steps_text(steps)}")
        return
    each, of = _constant(tokens, load)
    expected = load * of == tokens * each
    odd = steps[~expected]
    if not len(odd):
        return
    if expected.sum() < max(2, MAJORITY * len(steps)):
        ratio = load[some] / tokens[some]
        text = (
            f"load is not a fixed multiple of num_tokens: {ratio.min():.2f} to {ratio.max():.2f} tokens in a "
        )
        text += f"layer for each token of {plural(len(steps), 'step')}"
    else:
        more = int((load * of > tokens * each).sum())
        parts = [f"too many in {more:,} (is padding counted?)"] * bool(more)
        parts += [f"too few in {len(odd) - more:,} (were tokens lost?)"] * bool(len(odd) - more)
        times = f"{each / of:g}"
        text = f"load is not num_tokens × {times} in {steps_text(odd)}: {', '.join(parts)}"
    yield Finding("error", "num_tokens", text)


def steps_text(steps: npt.ArrayLike) -> str:
    unique = distinct(np.asarray(steps))
    return f"{len(unique):,} steps, starting at step {unique[0]}" if len(unique) > 1 else f"step {unique[0]}"
