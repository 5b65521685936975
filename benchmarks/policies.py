"""How long the policies take to place DeepSeek-V3's experts, compared with the engines' own code.

    python -m benchmarks.policies [--peer eplb.py] [--engines .venv-engines/bin/python] [--repeat 7]

58 layers, 256 experts on 288 slots, 32 ranks; hierarchical with 4 nodes and 8 groups, and global. The peers
run in a process of the engines' environment, one problem at a time: vLLM's and SGLang's as installed, and
with ``--peer`` a copy of deepseek-ai/EPLB's ``eplb.py``, which is in no package index. Our policies and the
peers take turns, each answer is compared, and medians are printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import workload
from eplb_analyze.policies.policy import POLICIES, Problem, lower_bound

#: Reads lines (peer, nodes, groups), answers with the seconds that the peer took and its placement.
PEERS = """
import importlib.util, json, sys, time
import torch
from sglang.srt.eplb.eplb_algorithms import deepseek as sglang
from vllm.distributed.eplb.policy.default import DefaultEplbPolicy

weight, slots, ranks, path = json.loads(sys.stdin.readline())
weight = torch.tensor(weight)

def deepseek(nodes, groups):
    return own.rebalance_experts(weight, slots, groups, nodes, ranks)[0]

def sglangs(nodes, groups):
    return sglang.rebalance_experts(weight, slots, groups, nodes, ranks, groups % nodes == 0)[0]

def vllm(nodes, groups):
    return DefaultEplbPolicy.rebalance_experts(weight, slots, groups, nodes, ranks)

if path:
    spec = importlib.util.spec_from_file_location("eplb", path)
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
peers = {"deepseek": deepseek, "sglang": sglangs, "vllm": vllm}
for line in sys.stdin:
    name, nodes, groups = json.loads(line)
    start = time.perf_counter()
    placed = peers[name](nodes, groups)
    print(json.dumps([time.perf_counter() - start, placed.tolist()]), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--engines", type=Path, default=Path(".venv-engines/bin/python"))
    parser.add_argument("--repeat", type=int, default=7)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    steps = 1000
    shape = (workload.LAYERS, workload.LOGICAL)
    # Tokens of a window, and of a window so short that many experts tie.
    windows = {
        f"{steps} steps": rng.poisson(118 * steps * rng.lognormal(0, 0.8, shape)),
        "a step, many ties": rng.poisson(6 * rng.lognormal(0, 0.8, shape)),
    }
    print(f"{shape[0]} layers × {shape[1]} experts → {workload.SLOTS} slots, {workload.EP_SIZE} ranks")
    for window, weight in windows.items():
        with subprocess.Popen(
            [args.engines, "-W", "ignore", "-c", PEERS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as peers:
            assert peers.stdin is not None
            setting = (weight.tolist(), workload.SLOTS, workload.EP_SIZE, args.peer and str(args.peer))
            print(json.dumps(setting), file=peers.stdin, flush=True)
            for name in (["deepseek"] if args.peer else []) + ["sglang", "vllm"]:
                for kind, nodes, groups in (("hierarchical", 4, 8), ("global", 1, 1)):
                    problem = Problem(weight, workload.SLOTS, workload.EP_SIZE, nodes, groups)
                    line(f"{name}, {kind}, {window}", *measure(peers, name, problem, args.repeat))
            peers.stdin.close()
    rows = np.concatenate([rng.permuted(weight, axis=1) for _ in range(100)])
    took = timed(lambda: lower_bound(rows, workload.SLOTS, workload.EP_SIZE))[0]
    print(f"lower_bound: {took / len(rows) * 1e6:.1f} µs a layer and window ({len(rows)} at once)")


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def measure(
    peers: subprocess.Popen[str], name: str, problem: Problem, repeat: int
) -> tuple[list[float], list[float]]:
    """The seconds of our policy and of the peer, in turns, without the first turn."""
    ours, theirs = [], []
    assert peers.stdin is not None
    assert peers.stdout is not None
    for _ in range(repeat + 1):
        print(json.dumps((name, problem.num_nodes, problem.num_groups)), file=peers.stdin, flush=True)
        took, placed = json.loads(peers.stdout.readline())
        theirs.append(took)
        took, own = timed(lambda: POLICIES[name](problem))
        ours.append(took)
        assert (own == np.array(placed)).all(), name
    return ours[1:], theirs[1:]


def line(name: str, ours: list[float], theirs: list[float]) -> None:
    own, peer = median(ours) * 1e3, median(theirs) * 1e3
    spread = f"[{min(ours) * 1e3:.1f} … {max(ours) * 1e3:.1f}]"
    print(f"{name:45s} {own:6.1f} ms {spread:16s} peer {peer:6.1f} ms   {peer / own:6.1f}x as fast")


if __name__ == "__main__":
    main()
