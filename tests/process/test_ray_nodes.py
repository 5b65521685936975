"""`postmortem` on a Ray cluster of two nodes, each in a network of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray_nodes
from batches import record_batch

pytestmark = [
    pytest.mark.long,  # a busy machine takes minutes to start Ray twice
    pytest.mark.skipif(ray_nodes.why_not() is not None, reason=str(ray_nodes.why_not())),
]

#: Which nodes do the tasks of our executor; a node has one processor, so tasks of half a second need both.
WHERE = """
import json, sys, time
from eplb_analyze.batch.executors import create_executor

def where(number):
    import ray
    time.sleep(0.5)
    return ray.util.get_node_ip_address()

executor = create_executor("ray", None, sys.argv[1])
found = [place for _, place in executor.map(where, range(12))]
executor.close()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_batch(tmp_path_factory.mktemp("batch")).root


def rows(root: Path, *options: str, prefix: list[str] | None = None) -> Any:
    command = [
        *(prefix or []),
        sys.executable,
        "-m",
        "eplb_analyze",
        "postmortem",
        str(root),
        "--json",
        *options,
    ]
    out = subprocess.run(
        command, env=ray_nodes.ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300
    )
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)["runs"]


def test_two_nodes_share_the_work_and_give_the_same_rows(root: Path) -> None:
    with ray_nodes.cluster(2) as address:
        program = ray_nodes.on_node(1, sys.executable, "-c", WHERE, address)
        out = subprocess.run(
            program, env=ray_nodes.ENVIRONMENT, capture_output=True, text=True, check=True, timeout=300
        )
        assert set(json.loads(out.stdout)) == {ray_nodes.address_of(1), ray_nodes.address_of(2)}
        by_ray = rows(root, "--executor", "ray", "--ray-address", address, prefix=ray_nodes.on_node(1))
    assert by_ray == rows(root)
