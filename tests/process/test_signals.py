"""Signal handlers that call the writer, and exits without ``close``, in real processes."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from helpers import (
    assert_equal_loads,
    load_of,
    manifest,
    run_child,
    sealed_loads,
    start_child,
    survived_loads,
)

HANDLED = """
import json, os, signal, sys
from dataclasses import asdict
from helpers import load_of, map_of, open_writer

writer = open_writer(sys.argv[1], flush_interval=0.02, segment_steps=64)

def handler(*_):
    calls = {"close": writer.close, "flush": writer.flush, "stats": writer.stats, "record": record}
    result = calls[sys.argv[2]]()
    # Not print: the signal can arrive before the other print has returned.
    os.write(1, json.dumps([result is not False, asdict(writer.stats())]).encode())
    os._exit(7)

def record():
    writer.record(None, load_of(0), map_of())

signal.signal(signal.SIGTERM, handler)
print("ready", flush=True)
step = 0
while True:
    writer.record(step, load_of(step), map_of(step // 50))
    step += 1
"""


@pytest.mark.parametrize("attempt", range(3))
@pytest.mark.parametrize("call", ["close", "flush", "stats", "record"])
def test_sigterm_handler_may_call_the_writer(tmp_path: Path, call: str, attempt: int) -> None:
    with start_child(HANDLED, tmp_path, call) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=60)  # a deadlock would last for ever
    assert (child.returncode, err) == (7, "")
    succeeded, stats = json.loads(out)
    assert succeeded
    parts = ("recorded", "dummy", "not_sampled", "dropped", "rejected")
    assert sum(stats[name] for name in parts) == stats["seen"]
    if call == "close":
        (folder,) = tmp_path.glob("run=*/model=*/rank=*/session=*")
        found = sealed_loads(folder) if stats["recorded"] else {}
        assert len(found) == stats["recorded"]
        assert_equal_loads(found, {step: load_of(step) for step in found})


@pytest.mark.parametrize("attempt", range(5))
def test_exit_without_close_while_sealing_seals_everything(tmp_path: Path, attempt: int) -> None:
    script = """
        import sys
        from helpers import load_of, map_of, open_writer

        writer = open_writer(sys.argv[1], segment_steps=20, flush_interval=0.01, queue_steps=4096)
        for step in range(300):
            writer.record(None, load_of(step), map_of(step // 50))
    """
    assert run_child(script, tmp_path) == ""
    (folder,) = tmp_path.glob("run=*/model=*/rank=*/session=*")
    assert not list(folder.glob("journal-*"))
    assert manifest(folder)[-1].kind == "closed"
    assert_equal_loads(survived_loads(folder), {step: load_of(step) for step in range(300)})
