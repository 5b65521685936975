"""The end of a vLLM worker: its recording begins to close as soon as the worker is told to shut down.

vLLM asks its engine processes to end, and 5 seconds later it kills them with their workers. The exit of the
process is too late to begin: before it, the worker frees the model and aborts its NCCL communicators, and
vLLM waits up to 5 seconds for each abort, which blocks while CUDA graphs use the communicator. The worker's
thread does not wait for the recording: the background seals it while the worker is torn down.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from eplb_dump.engines.common import warn_once
from eplb_dump.engines.vllm_pass import logger, version

#: Every executor shuts its workers down through the wrapper in this module.
WORKER = "vllm.v1.worker.worker_base"


def watch_worker(module: Any) -> None:
    """Wrap the worker's ``shutdown``, if this vLLM version has it."""
    worker: Any = getattr(module, "WorkerWrapperBase", None)
    original = getattr(worker, "shutdown", None)
    if original is None:
        text = "if it is killed while it shuts down, the recording is not sealed"
        warn_once(logger, f"vLLM {version()} is not known: {text}")
        return
    if hasattr(original, "eplb_dump"):
        return

    @functools.wraps(original)
    def shutdown(self: Any, *more: Any, **named: Any) -> Any:
        with contextlib.suppress(Exception):  # a worker that failed early lacks some of it
            # Only this worker's: another engine in the same process may go on.
            recorder = vars(self.worker.model_runner.eplb_state).get("eplb_dump")
            if recorder is not None:
                recorder.close()
        return original(self, *more, **named)

    shutdown.eplb_dump = True  # type: ignore[attr-defined]
    worker.shutdown = shutdown
