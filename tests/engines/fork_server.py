"""Run scripts in forks of one process that has imported an engine: ``python fork_server.py vllm|sglang``.

Importing vLLM or SGLang takes about ten seconds of CPU time in every process, and a test needs three to five
processes. Here the import happens once. Each script still runs in a process of its own, in the state that the
import leaves, and nothing that one script does is visible to the next.

Each line on stdin is a job, ``{"arguments": [SCRIPT, ...], "environment": {...}, "output": FILE,
"errors": FILE}``. Its process leads a process group. The answer is two lines on stdout: the process id
when it starts and the exit code when it ends.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import sys
import traceback
from typing import Any, NoReturn, TextIO

#: The modules that the scripts of this folder import. They must not start threads, and import no plugin.
MODULES = {
    "vllm": [
        "vllm.config",
        "vllm.distributed.eplb.eplb_state",
        "vllm.distributed.device_communicators.cpu_communicator",
        "vllm.plugins",
        "vllm.v1.core.sched.async_scheduler",
        "vllm.v1.executor",
        "vllm.v1.worker.gpu_model_runner",  # but not V2's, so that the plugin sees it imported
        "pyarrow.parquet",
    ],
    "sglang": [
        "sglang_ranks",  # first: it replaces what SGLang cannot import without a GPU
        "sglang.srt.model_executor.model_runner",
        "sglang.srt.eplb.expert_distribution",
        "sglang.srt.server_args",
        "pyarrow.parquet",
    ],
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what an import prints is no answer
    os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "INFO"}
    for module in MODULES[sys.argv[1]]:
        importlib.import_module(module)
    print("ready", file=answers)
    while line := sys.stdin.readline():
        job = json.loads(line)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            answers.close()
            run(job)
        print(pid, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers)


def run(job: dict[str, Any]) -> NoReturn:
    """Become the job's process, and end as a process ends, but without taking the modules apart (3 s)."""
    os.setsid()
    replace(sys.stdin, os.devnull, os.O_RDONLY)
    replace(sys.stdout, job["output"], os.O_WRONLY | os.O_CREAT)
    replace(sys.stderr, job["errors"], os.O_WRONLY | os.O_CREAT)
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv = job["arguments"]
    code: Any = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as exit_:
        code = exit_.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def replace(stream: TextIO, path: str, flags: int) -> None:
    descriptor = os.open(path, flags)
    os.dup2(descriptor, stream.fileno())
    os.close(descriptor)


if __name__ == "__main__":
    main()
