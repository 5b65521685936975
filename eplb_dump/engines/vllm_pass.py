"""What a pass of vLLM's model runner consists of: its phase and its tokens, noted before ``EplbState.step``.

The phase comes from the scheduler's output that the runner's ``execute_model`` is given, the tokens from
``EplbState.prepare_forward``, which tells the router how many to count: without padding, and without what
the runner leaves out after scheduling. The scheduler may be a pass ahead, but not the runner: it is given
the next pass after it stepped EPLB for the one before.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

from eplb_dump.engines.common import warn_once

logger = logging.getLogger("vllm.eplb_dump")  # below vLLM's own logger, so that its handler shows it

#: Model runner V1 and V2; those of other platforms are their subclasses.
RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")


def version() -> str:
    return str(getattr(sys.modules.get("vllm"), "__version__", "of unknown version"))


class CurrentPass:
    """The pass that runs. An error while it is noted ends the notes, not the recording."""

    def __init__(self) -> None:
        self._scheduled: Any = None
        #: By model, as they begin their forward passes; None, or no entry: not known.
        self.tokens: dict[str, int | None] = {}
        self._names: dict[int, str] = {}
        self._off = False

    def stop(self, why: str) -> None:
        """End the notes."""
        self._off = True
        self.clear()
        warn_once(
            logger, f"phases and tokens of steps are not recorded: vLLM {version()} is not supported ({why})"
        )

    def scheduled(self, output: Any) -> None:
        """The model runner is about to run what the scheduler chose."""
        if not self._off:
            self._scheduled, self.tokens = output, {}

    def begins(self, model_config: Any, num_tokens: int) -> str | None:
        """A forward pass begins: the key of its model, if it is that model's first in this pass."""
        if self._scheduled is None:
            return None
        name = self._names.get(id(model_config))
        if name is None:
            name = self._names[id(model_config)] = model_config.compute_hash()
        if name in self.tokens:
            return None
        # The main model is first. A drafter may run several times, in a CUDA graph unseen from here.
        self.tokens[name] = None if self.tokens else num_tokens
        return name

    def phase(self) -> str | None:
        if self._off:
            return None
        if self._scheduled is None:
            self.stop("its model runner has a different layout")
            return None
        try:
            return phase(self._scheduled)
        except Exception as error:
            self.stop(f"{type(error).__name__}: {error}")
            return None

    def clear(self) -> None:
        self._scheduled, self.tokens = None, {}


def watch_runner(module: Any) -> None:
    """Wrap the model runner's ``execute_model``, if this vLLM version has it."""
    runner: Any = getattr(module, "GPUModelRunner", None)
    original = getattr(runner, "execute_model", None)
    if original is None or hasattr(original, "eplb_dump"):
        return

    @functools.wraps(original)
    def execute_model(self: Any, scheduler_output: Any, *more: Any, **named: Any) -> Any:
        state = getattr(self, "eplb_state", None)
        recorder_of = getattr(getattr(type(state), "step", None), "eplb_dump", None)
        if recorder_of is not None:
            recorder_of(state).current.scheduled(scheduler_output)
        return original(self, scheduler_output, *more, **named)

    execute_model.eplb_dump = True  # type: ignore[attr-defined]
    runner.execute_model = execute_model


def phase(scheduled: Any) -> str:
    """``prefill``, ``decode`` or ``mixed``, of vLLM's SchedulerOutput.

    A request decodes if it has output and is given one token, beside those drafted for it. One that was
    preempted and computes its tokens again is given more. With hundreds of requests, Python loops over
    none of them if all decode, and otherwise over those before the first that does.
    """
    cached, drafts = scheduled.scheduled_cached_reqs, scheduled.scheduled_spec_decode_tokens
    given, outputs, resumed = scheduled.num_scheduled_tokens, cached.num_output_tokens, cached.resumed_req_ids
    undrafted = scheduled.total_num_scheduled_tokens
    if drafts:
        undrafted -= sum(map(len, drafts.values()))
    if not (scheduled.scheduled_new_reqs or resumed or undrafted > len(given) or 0 in outputs):
        return "decode"
    decodes = (
        output and name not in resumed and given[name] == 1 + len(drafts.get(name, ()))
        for name, output in zip(cached.req_ids, outputs, strict=True)
    )
    return "mixed" if any(decodes) else "prefill"
