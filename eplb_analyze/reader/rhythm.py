"""Which changes of placement belong to one rearrangement.

A synchronous engine changes all layers in one step. Others move one layer, or a few, in each step, so one
rearrangement can span many steps. What the engine states decides; what it does not state, the changes show.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eplb_dump.format.session import SessionInfo

#: Without anything stated, single layers that change at most this many steps apart belong together.
FALLBACK_GAP = 64
#: Gaps within a rearrangement and gaps between two differ at least by this factor.
SCALES = 3.0


@dataclass(frozen=True)
class Change:
    """A layer's placement changes at a step."""

    step: int
    #: The layer's index.
    layer: int
    slots: int


@dataclass(frozen=True)
class Rhythm:
    """What an engine states about its rearrangements; None: it does not say.

    Attributes:
        interval: steps from one rearrangement to the next.
        span: the most steps that one rearrangement takes; 1 if it changes all layers in one step.
        sampling: one step out of so many is recorded, so a change is seen up to ``sampling - 1`` steps late.
    """

    interval: int | None = None
    span: int | None = None
    sampling: int = 1

    @classmethod
    def stated(cls, info: SessionInfo, num_layers: int) -> Rhythm:
        """The rhythm in the engine's configuration.

        vLLM 0.33 states ``eplb_config`` with ``step_interval`` and ``use_async``; asynchronous transfers take
        as long as they take. SGLang 0.5.23 states ``eplb_rebalance_num_iterations`` and
        ``eplb_rebalance_layers_per_chunk``: one chunk of layers moves in each pass, without chunks all do.
        """
        config = info.engine_config
        vllm = config.get("eplb_config")
        interval: Any = None
        span: int | None = None
        if isinstance(vllm, dict):
            interval = vllm.get("step_interval")
            span = 1 if vllm.get("use_async") is False else None
        elif "eplb_rebalance_num_iterations" in config:
            interval = config["eplb_rebalance_num_iterations"]
            if "eplb_rebalance_layers_per_chunk" in config:
                chunk = _count(config["eplb_rebalance_layers_per_chunk"]) or max(1, num_layers)
                span = max(1, -(-num_layers // chunk))
        return cls(_count(interval), span, info.interval)

    def group(self, changes: Sequence[Change]) -> list[list[Change]]:
        """The rearrangements of a run in order of steps; a layer changes once in each."""
        changes = sorted(changes, key=lambda change: (change.step, change.layer))
        largest_gap = self._largest_gap(changes)
        groups: list[list[Change]] = []
        layers: set[int] = set()
        pace = 0
        for change in changes:
            if groups:
                gap = change.step - groups[-1][-1].step
                since = change.step - groups[-1][0].step
                if change.layer not in layers and gap <= largest_gap and self._fits(since, gap, pace):
                    groups[-1].append(change)
                    layers.add(change.layer)
                    pace = max(pace, gap)
                    continue
            groups.append([change])
            layers, pace = {change.layer}, 0
        return groups

    def _fits(self, since: int, gap: int, pace: int) -> bool:
        """Whether a change ``since`` steps after the first of a rearrangement belongs to it."""
        if self.span is not None:
            return since < self.span + self.sampling - 1
        # A transfer that takes longer than the interval goes on at its pace: the engine waits for its end.
        return self.interval is None or since < self.interval or gap <= 2 * pace

    def _largest_gap(self, changes: Sequence[Change]) -> float:
        """The largest number of steps between two consecutive changes of one rearrangement."""
        if self.span is not None:
            return math.inf
        if self.interval is not None:
            return self.interval / 2
        steps = sorted({change.step for change in changes})
        gaps = sorted(b - a for a, b in itertools.pairwise(steps))
        # Steps usually change several layers: then a rearrangement is a step, or consecutive steps.
        at_once = len(changes) >= 2 * len(steps)
        if len(gaps) < 2:
            return self.sampling if at_once else FALLBACK_GAP
        # Half of the gaps or more are within rearrangements if these take several steps each.
        upper = gaps[(len(gaps) - 1) // 2 :]
        large = [(b / a, a) for a, b in itertools.pairwise(upper) if b > FALLBACK_GAP]
        ratio, small = max(large, default=(1.0, 0))
        if ratio >= SCALES:
            return small
        # One pace throughout: layer after layer, until the first layer changes again.
        return self.sampling if at_once else math.inf


def _count(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
