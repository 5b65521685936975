"""A real Prometheus server scrapes a live recording, and its alerts fire; promtool checks what we ship."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, cli, start_child, write

PROGRAM = Path(sys.executable).with_name("eplb-analyze")
RULES = ROOT / "deploy/prometheus/eplb-alerts.yml"
DASHBOARD = ROOT / "deploy/grafana/eplb-dashboard.json"
#: Ends a test that hangs.
HANGS_SECONDS = 180.0

needs = pytest.mark.skipif(
    not all(map(shutil.which, ("prometheus", "promtool", "prometheus-node-exporter"))),
    reason="no Prometheus; `apt-get install prometheus prometheus-node-exporter`",
)

#: An engine of four ranks, each with a writer. It takes commands between two steps.
ENGINE = """
    import queue, sys, threading, time
    import numpy as np
    from eplb_dump import ExpertLoadWriter, metrics_file
    metrics_file.REFRESH_SECONDS = 0.5
    root, textfiles = sys.argv[1:]
    RANKS, LAYERS, EXPERTS = 4, 3, 16
    writers = [
        ExpertLoadWriter(root, model="org/moe", num_logical_experts=EXPERTS, ep_size=RANKS, ep_rank=rank,
                         run_id="planted", flush_interval=0.2, metrics_file=textfiles + "/eplb")
        for rank in range(RANKS)
    ]
    commands = queue.Queue()
    threading.Thread(target=lambda: [commands.put(line.strip()) for line in sys.stdin], daemon=True).start()
    rng, done, step = np.random.default_rng(1), set(), 0
    placement = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    while "close" not in done:
        while not commands.empty():
            done.add(commands.get())
            if "rearrange" in done:
                placement = np.tile(np.roll(np.arange(EXPERTS), 1), (LAYERS, 1))
                done.remove("rearrange")
                time.sleep(0.2)
        mean = np.full((LAYERS, EXPERTS), 40.0) * rng.uniform(0.5, 1.5)
        if "incident" in done:
            mean[1:, 6] *= 12  # slot 6 is on rank 1
        loads = rng.poisson(mean / RANKS, size=(RANKS, LAYERS, EXPERTS))
        slowest = loads.sum(axis=0).reshape(LAYERS, RANKS, -1).sum(axis=2).max(axis=1).sum()
        for rank, writer in enumerate(writers):
            if "stop" in done and rank == 3:
                continue
            if "drop" in done and rank == 2 and step % 5 == 0:
                writer.skip("dropped", step)
                continue
            writer.record(step, loads[rank], placement, phase="decode", step_ms=2 + 0.01 * slowest)
        step += 1
        time.sleep(0.01)
    assert all(writer.close(20) for writer in writers)
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def running(*command: str | Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (
        log.open("wb") as file,
        subprocess.Popen(list(map(str, command)), stdout=file, stderr=file) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


class Server:
    """A Prometheus server that scrapes and evaluates every half second."""

    def __init__(self, folder: Path, stack: ExitStack, sidecar: int, node: int) -> None:
        self.port = free_port()
        self.log = folder / "prometheus.log"
        rules = re.sub(r"for: \d+[sm]", "for: 1s", RULES.read_text())
        (folder / "rules.yml").write_text(re.sub(r"\[\d+m\]", "[10s]", rules))
        (folder / "prometheus.yml").write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
                    "rule_files": [str(folder / "rules.yml")],
                    "scrape_configs": [
                        {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
                        for job, port in (("eplb", sidecar), ("node", node))
                    ],
                }
            )
        )
        command = [
            "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]  # fmt: skip
        self.process = stack.enter_context(running(*command, log=self.log))

    def get(self, path: str, **query: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            if error.code == 503:
                raise ConnectionError("the server is starting") from None
            # The body says what is wrong with the query.
            raise AssertionError(f"{query}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return found

    def wait_for(self, expression: str) -> list[dict[str, Any]]:
        """What a query returns once it returns anything."""
        deadline = time.monotonic() + HANGS_SECONDS
        while time.monotonic() < deadline:
            try:
                found = self.query(expression)
            except (urllib.error.URLError, ConnectionError):  # it is starting
                assert self.process.poll() is None, self.log.read_text()
                found = []
            if found:
                return found
            time.sleep(0.2)
        raise AssertionError(f"no data: {expression}; firing: {self.query('ALERTS')}")

    def wait_for_alert(self, name: str, text: str = "", **labels: str) -> dict[str, Any]:
        """The firing alert, once its description has some text. The first edges of an incident are rough."""
        deadline = time.monotonic() + HANGS_SECONDS
        while time.monotonic() < deadline:
            for alert in self.get("alerts")["alerts"]:
                own = alert["labels"]
                found = own["alertname"] == name and labels.items() <= own.items()
                if found and alert["state"] == "firing" and text in alert["annotations"]["description"]:
                    return dict(alert)
            time.sleep(0.2)
        raise AssertionError(f"{name} does not fire; firing: {self.query('ALERTS')}")


def dashboard_queries() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return found + [one["expr"] for one in dashboard["annotations"]["list"] if "expr" in one]


@needs
def test_live_recording_is_scraped_and_its_alerts_fire(tmp_path: Path) -> None:
    dump, textfiles = tmp_path / "dump", tmp_path / "textfiles"
    textfiles.mkdir()
    sidecar_port, node_port = free_port(), free_port()
    with ExitStack() as stack:
        command = [PROGRAM, "serve-metrics", dump, "--host", "127.0.0.1", "--interval", "0.5"]
        sidecar_log = tmp_path / "sidecar.log"
        sidecar = stack.enter_context(running(*command, "--port", str(sidecar_port), log=sidecar_log))
        exporter = [
            "prometheus-node-exporter", "--collector.disable-defaults", "--collector.textfile",
            f"--collector.textfile.directory={textfiles}", f"--web.listen-address=127.0.0.1:{node_port}",
        ]  # fmt: skip
        stack.enter_context(running(*exporter, log=tmp_path / "exporter.log"))
        server = Server(tmp_path, stack, sidecar_port, node_port)

        server.wait_for("eplb_sidecar_following == 0")  # there is no dump yet
        engine = stack.enter_context(start_child(ENGINE, dump, textfiles))
        stack.callback(engine.kill)

        def tell(word: str) -> None:
            assert engine.stdin is not None
            print(word, file=engine.stdin, flush=True)

        server.wait_for("eplb_complete_steps_total > 200")
        tell("rearrange")
        server.wait_for("eplb_complete_steps_total > 900 and eplb_rearrangement_pause_seconds_count == 1")
        server.wait_for("eplb_imbalance_cost_measurable == 1 and eplb_imbalance_cost_seconds > 0")
        assert server.query('ALERTS{alertname="EplbRankStraggles"}') == []
        (info,) = server.query("eplb_run_info")
        assert info["metric"]["run"] == "planted"
        assert info["metric"]["model"] == "org/moe"

        tell("incident")
        found = "layer -1, rank 1 (-1: several)"
        incident = server.wait_for_alert("EplbIncident", found, run="planted", model="org/moe")
        straggler = server.wait_for_alert("EplbRankStraggles", rank="1")
        server.wait_for("eplb_worst_rank == 1")
        for written in dashboard_queries():
            query = written.replace('job="$job",instance="$instance"', 'job="eplb"')
            query = re.sub(r"\$__(rate_interval|interval|range)", "5m", query)
            assert "$" not in query
            server.wait_for(query)

        tell("drop")
        alerts = [incident, straggler, server.wait_for_alert("EplbRecorderDropsSteps", rank="2")]
        alerts.append(server.wait_for_alert("EplbWriterDropsSteps", rank="2", model="org/moe"))
        tell("stop")
        alerts.append(server.wait_for_alert("EplbRankStopped", rank="3"))

        # What a runbook says works on the recording that raised the alert.
        commands = {
            line
            for alert in alerts
            for line in re.findall(r"`eplb-analyze ([^`]+)`", alert["annotations"]["runbook"])
        }
        assert len(commands) >= 5
        for line in sorted(commands):
            result = cli(*line.split(), env={"EXPERT_LOAD_DUMP_DIR": str(dump)})
            # 1 and 3: the data is incomplete, as the alert says.
            assert result.returncode in (0, 1, 3), (line, result.stderr)
            assert result.stdout

        with urllib.request.urlopen(f"http://127.0.0.1:{sidecar_port}/metrics", timeout=30) as page:
            assert_good_metrics(page.read())
        tell("close")
        _, errors = engine.communicate(timeout=HANGS_SECONDS)
        assert (engine.returncode, errors.count("\n")) == (0, 1)
        assert errors.startswith("dropped a step")
        server.wait_for("eplb_run_closed == 1")
        server.wait_for("sum(eplb_writer_closed) == 4")
        sidecar.send_signal(signal.SIGTERM)
        assert sidecar.wait(60) == 0
    log = sidecar_log.read_text()
    assert f"serving metrics of {dump} on http://127.0.0.1:{sidecar_port}/metrics" in log
    assert "following run planted, model org/moe" in log
    assert "Traceback" not in log
    for path in textfiles.glob("*.prom"):
        assert_good_metrics(path.read_bytes())


def assert_good_metrics(text: bytes) -> None:
    """The text is well-formed, and its names and help follow Prometheus' rules."""
    result = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    own = [line for line in result.stderr.decode().splitlines() if line.startswith("eplb_")]
    assert result.returncode in (0, 3), result.stderr.decode()  # 3: only hints, maybe on Python's own metrics
    assert own == []


@needs
def test_metrics_of_one_reading_pass_promtool(tmp_path: Path) -> None:
    write(tmp_path, steps=40)
    assert_good_metrics(cli("serve-metrics", "--once", tmp_path).stdout.encode())


@needs
@pytest.mark.parametrize("line", ["check rules eplb-alerts.yml", "test rules eplb-alerts.test.yml"])
def test_rules_pass_promtool(line: str) -> None:
    result = subprocess.run(
        ["promtool", *line.split()], cwd=RULES.parent, capture_output=True, text=True, check=False
    )
    assert (result.returncode, "SUCCESS" in result.stdout) == (0, True), result.stdout + result.stderr


@needs
def test_scrape_configuration_passes_promtool(tmp_path: Path) -> None:
    shutil.copy(RULES, tmp_path)
    configuration = yaml.safe_load(RULES.with_name("scrape.yml").read_text())
    for job in configuration["scrape_configs"]:
        # Debian's Prometheus is built without it.
        assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
        job["static_configs"] = [{"targets": ["host:9464"]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    command = ["promtool", "check", "config", "prometheus.yml"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "15 rules found" in result.stdout
