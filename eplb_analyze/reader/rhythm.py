"""Which changes of placement belong to one rearrangement.

A synchronous engine changes all layers in one step. Others move one layer, or a few, in each step, so one
rearrangement can span many steps. They move the layers in ascending order: vLLM 0.33
(``distributed/eplb/async_worker.py``) and SGLang 0.5.23 (``EPLBManager._compute_update_layer_ids_chunks``).

Two consecutive changes decide by themselves whether they belong together, so a rearrangement is the same
whether all of a run is known, only what is kept of it, or only its newest steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from eplb_dump.format.frozen import frozen
from eplb_dump.format.session import SessionInfo

#: Without anything stated, single layers that change at most this many steps apart belong together.
FALLBACK_GAP = 64


class Change(NamedTuple):
    """A layer's placement changes at a step."""

    step: int
    #: The layer's index.
    layer: int
    #: How many slots hold another expert than before; None if the placement before is not known.
    slots: int | None


@frozen
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
        """The rearrangements of a run in order of steps."""
        ordered = sorted(changes, key=lambda change: (change.step, change.layer))
        groups: list[list[Change]] = []
        before: list[Change] = []
        for _, at_step in itertools.groupby(ordered, key=lambda change: change.step):
            now = [*at_step]
            if before and self._continues(before, now):
                groups[-1] += now
            else:
                groups.append([*now])
            before = now
        return groups

    def _continues(self, before: list[Change], now: list[Change]) -> bool:
        """Whether the changes of a step go on with what those of the step before them began."""
        if now[0].layer <= before[-1].layer:  # a rearrangement moves the layers in ascending order
            return False
        gap = now[0].step - before[0].step
        if self.span is not None:
            return gap < self.span + self.sampling - 1
        if self.interval is not None:
            return gap <= self.interval / 2
        # Several layers in a step show an engine that moves all of them, or a chunk in each step.
        at_once = len(before) > 1 or len(now) > 1
        return gap <= (self.sampling if at_once else FALLBACK_GAP)


def _count(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
