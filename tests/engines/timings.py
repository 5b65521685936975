"""Let an engine write step times: ``timings.py vllm|sglang FILE``; one line a step, of 90 + step ms."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

STEPS = 5


def vllm() -> None:
    import vllm.logger as log
    from vllm.v1.metrics.loggers import LoggingStatLogger
    from vllm.v1.metrics.stats import SchedulerIterationDetails, SchedulerStats

    log._configure_vllm_root_logger()
    log.set_vllm_process_name("APIServer")
    logger = object.__new__(LoggingStatLogger)
    logger.engine_index, logger.kv_cache_device = 0, "GPU"
    for step in range(STEPS):
        details = SchedulerIterationDetails(step, 1, 512, 64, 64, 90.0 + step)
        stats = SchedulerStats(kv_cache_usage=0.5, iteration_details=details)
        logger._log_iteration_details(stats, 0)


def sglang() -> None:
    import msgspec
    from sglang.srt.observability.forward_pass_metrics import ForwardPassMetrics, ScheduledRequestMetrics

    for step in range(STEPS):
        requests = ScheduledRequestMetrics(1, 512, num_decode_requests=64)
        metrics = ForwardPassMetrics(
            counter_id=step, wall_time=(90 + step) / 1e3, scheduled_requests=requests
        )
        print(msgspec.json.encode(metrics).decode())


if __name__ == "__main__":
    with Path(sys.argv[2]).open("w") as file, contextlib.redirect_stdout(file):
        {"vllm": vllm, "sglang": sglang}[sys.argv[1]]()
