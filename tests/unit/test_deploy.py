"""What `deploy/` holds fits the metrics that there are; tests/process/test_prometheus.py runs it."""

from __future__ import annotations

import json
import re
from itertools import combinations
from typing import Any

import pytest
import yaml
from helpers import ROOT, session_info
from typer.main import get_command

from eplb_analyze.cli.app import app
from eplb_analyze.live.metric_families import METRICS
from eplb_dump import WriterStats
from eplb_dump.budget import Retention
from eplb_dump.metrics_file import render

DEPLOY = ROOT / "deploy"
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus/eplb-alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads((DEPLOY / "grafana/eplb-dashboard.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel.get("targets", [])]
ANNOTATIONS = [one["expr"] for one in DASHBOARD["annotations"]["list"] if "expr" in one]
VARIABLES = [one["query"]["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]


def series() -> set[str]:
    """All names that a query can have."""
    own = {name for name, (kind, _) in METRICS.items() if kind != "summary"}
    own |= {
        f"{name}_{end}"
        for name, (kind, _) in METRICS.items()
        for end in ("sum", "count")
        if kind == "summary"
    }
    text = render(session_info(), WriterStats(), waiting=0, written_at=0.0, ended=False)
    return own | set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))


@pytest.mark.parametrize("query", [*QUERIES, *ANNOTATIONS, *VARIABLES, *(rule["expr"] for rule in RULES)])
def test_queries_name_metrics_that_there_are(query: str) -> None:
    names = set(re.findall(r"\beplb_\w+", query))
    assert names <= series()
    assert names or re.search(r"\bup\b|\bprocess_(cpu_seconds_total|resident_memory_bytes)\b", query)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_alert_says_what_to_do_next(rule: dict[str, Any]) -> None:
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    for name in re.findall(r"eplb_\w+", str(rule["annotations"])):
        assert name in {*METRICS, "eplb_dump"}
    command: Any = get_command(app)
    lines = re.findall(r"`eplb-analyze ([^`]+)`", rule["annotations"]["runbook"])
    assert lines or rule["alert"] == "EplbSidecarHangs"  # the file system hangs for the command, too
    for line in lines:
        name, *words = re.sub(r"{{.*?}}", "ID", line).split()
        options = {option for parameter in command.commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options
    if "eplb_run_info" in rule["expr"]:
        assert all("--run {{" in line for line in lines)


def test_every_alert_fires_in_a_unit_test_and_is_documented() -> None:
    tests = (DEPLOY / "prometheus/eplb-alerts.test.yml").read_text()
    page = (ROOT / "docs/operate/metrics.md").read_text()
    names = [rule["alert"] for rule in RULES]
    assert len(names) == len(set(names))
    for name in names:
        assert re.search(rf'alertname="{name}",alertstate="firing"|alertname: {name}\n', tests), name
        assert f"`{name}`" in page, name


def test_panels_are_on_the_grid_without_overlap() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(ids) == len(set(ids))
    for panel in PANELS:
        place = panel["gridPos"]
        assert 0 <= place["x"] <= place["x"] + place["w"] <= 24
    for one, other in combinations([panel["gridPos"] for panel in PANELS], 2):
        apart = [
            a[at] + a[size] <= b[at]
            for at, size in (("x", "w"), ("y", "h"))
            for a, b in ((one, other), (other, one))
        ]
        assert any(apart), (one, other)


def test_panels_say_what_they_show_and_take_the_chosen_data_source() -> None:
    source = {"type": "prometheus", "uid": "${datasource}"}
    variables = {one["name"] for one in DASHBOARD["templating"]["list"]}
    titles = [panel["title"] for panel in PANELS]
    assert len(titles) == len(set(titles))
    for panel in PANELS:
        if panel["type"] == "row":
            assert panel["collapsed"] is False
            continue
        assert panel["type"] in ("stat", "timeseries", "bargauge")
        assert panel["datasource"] == source
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"] in (
            "none",
            "short",
            "percentunit",
            "s",
            "ops",
            "bytes",
        )
        refs = [target["refId"] for target in panel["targets"]]
        assert refs
        assert len(refs) == len(set(refs))
        legends = [target["legendFormat"] for target in panel["targets"]]
        named = {p["matcher"]["options"] for p in panel["fieldConfig"]["overrides"]}
        assert named <= {*legends}
        for target in panel["targets"]:
            assert target["datasource"] == source
            used = set(re.findall(r"\$(\w+)", target["expr"]))
            assert used <= variables | {"__rate_interval", "__interval", "__range"}
            # A query of one sidecar's data must not mix several.
            assert ("eplb_writer_" in target["expr"]) == ("$instance" not in target["expr"])


def test_sidecar_manifest_fits_the_scrape_configuration() -> None:
    manifest = yaml.safe_load((DEPLOY / "kubernetes/sidecar.yaml").read_text())
    pod = manifest["spec"]["template"]["spec"]
    engine, sidecar, retention = pod["containers"]
    assert sidecar["command"] == ["eplb-analyze", "serve-metrics"]
    folder = {"name": "EXPERT_LOAD_DUMP_DIR", "value": "/dumps"}
    for container in (engine, sidecar, retention):
        assert folder in container["env"]
    (mount,) = sidecar["volumeMounts"]
    assert mount == {"name": "dumps", "mountPath": "/dumps", "readOnly": True}
    (port,) = sidecar["ports"]
    command: Any = get_command(app)
    defaults = {parameter.name: parameter.default for parameter in command.commands["serve-metrics"].params}
    assert port["containerPort"] == defaults["port"]
    scrape = yaml.safe_load((DEPLOY / "prometheus/scrape.yml").read_text())
    assert [job["job_name"] for job in scrape["scrape_configs"]] == ["eplb", "engine"]
    for job, scraped in zip(scrape["scrape_configs"], (port, *engine["ports"]), strict=True):
        assert any(one.get("regex") == scraped["name"] for one in job["relabel_configs"])
        # The alerts join engines and sidecars by these.
        assert {one.get("target_label") for one in job["relabel_configs"]} == {None, "namespace", "pod"}


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["value"] for one in container["env"]}


def test_claim_of_the_sidecar_manifest_holds_what_its_writers_and_its_retention_allow() -> None:
    manifest = yaml.safe_load((DEPLOY / "kubernetes/sidecar.yaml").read_text())
    engine, _, retention = manifest["spec"]["template"]["spec"]["containers"]
    (claim,) = manifest["spec"]["volumeClaimTemplates"]
    (storage,) = re.fullmatch(r"(\d+)Gi", claim["spec"]["resources"]["requests"]["storage"]).groups()  # type: ignore[union-attr]
    (ranks,) = re.findall(r"--tensor-parallel-size (\d+)", engine["args"][0])
    budget = Retention.of(variables(engine)["EXPERT_LOAD_DUMP_MAX_BYTES"], None, None).max_bytes
    assert budget is not None
    (line,) = re.findall(r"eplb-analyze prune .*", retention["args"][0])
    (earlier,) = re.findall(r"--max-bytes (\d+)G$", line)
    # A tenth is for the file system.
    assert (int(ranks) * budget + int(earlier) * 10**9) * 1.1 <= int(storage) * 2**30
