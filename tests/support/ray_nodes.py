"""A Ray cluster of several nodes on one machine: each node in its own network namespace.

The nodes share files, and reach each other only through a bridge, as machines on a network do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

#: Of the head; Ray's client is not used: the program runs on the first node.
PORT = 6399
ENVIRONMENT = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
RAY = str(Path(sys.executable).with_name("ray"))


def why_not() -> str | None:
    """Why there can be no nodes here; None if there can."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need Linux, root and iproute2"
    if not Path(RAY).exists():
        return "Ray is not installed"
    name = f"eplb-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if tried.returncode:
        return "this machine has no network namespaces"
    _ip("netns", "delete", name)
    return None


def on_node(number: int, *command: str) -> list[str]:
    """The command line that runs a command on a node, numbered from 1."""
    return ["ip", "netns", "exec", _name(number), *command]


def address_of(number: int) -> str:
    return f"10.213.77.{number}"


@contextlib.contextmanager
def cluster(nodes: int, cpus: int = 1) -> Iterator[str]:
    """The address of a cluster of so many nodes; the first is its head. It ends with the context."""
    bridge = f"eplb{os.getpid()}"
    started: list[subprocess.Popen[bytes]] = []
    folder = tempfile.mkdtemp(prefix="ray")  # short: sockets lie in it
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        for number in range(1, nodes + 1):
            _add_node(number, bridge)
        for number in range(1, nodes + 1):
            place = ["--head", "--port", str(PORT), "--include-dashboard=false", "--temp-dir", folder]
            place = place if number == 1 else ["--address", f"{address_of(1)}:{PORT}"]
            start = [
                RAY, "start", "--block", "--disable-usage-stats", "--num-cpus", str(cpus),
                "--node-ip-address", address_of(number), "--object-store-memory", "100000000", *place,
            ]  # fmt: skip
            started.append(
                subprocess.Popen(
                    on_node(number, *start), env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL, start_new_session=True,
                )
            )  # fmt: skip
            _wait_until_joined(number)
        yield f"{address_of(1)}:{PORT}"
    finally:
        for node in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)  # a clean shutdown takes half a minute
            node.wait(30)
        for number in range(1, nodes + 1):
            _end_processes(number)
            _ip("netns", "delete", _name(number), check=False)
        _ip("link", "delete", bridge, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _name(number: int) -> str:
    return f"eplb-{os.getpid()}-{number}"


def _add_node(number: int, bridge: str) -> None:
    outside, inside = f"eo{os.getpid()}x{number}", f"ei{os.getpid()}x{number}"
    _ip("netns", "add", _name(number))
    _ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", _name(number))
    _ip("link", "set", outside, "master", bridge, "up")
    for command in (
        ["link", "set", "lo", "up"],
        ["addr", "add", f"{address_of(number)}/24", "dev", inside],
        ["link", "set", inside, "up"],
    ):
        _ip("-n", _name(number), *command)


def _wait_until_joined(nodes: int) -> None:
    """Until the head knows so many nodes."""
    ask = [
        sys.executable, "-c",
        "import sys, ray\n"
        "ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR')\n"
        "sys.exit(sum(node['Alive'] for node in ray.nodes()) < int(sys.argv[2]))",
        f"{address_of(1)}:{PORT}", str(nodes),
    ]  # fmt: skip
    end = time.monotonic() + 180
    while subprocess.run(on_node(1, *ask), env=ENVIRONMENT, capture_output=True, check=False).returncode:
        assert time.monotonic() < end, f"node {nodes} did not join the cluster"
        time.sleep(0.5)


def _end_processes(number: int) -> None:
    """Ray's own processes are in sessions of their own."""
    out = subprocess.run(["ip", "netns", "pids", _name(number)], capture_output=True, text=True, check=False)
    for pid in map(int, out.stdout.split()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)
