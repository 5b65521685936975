"""The packages as a user gets them: built twice, read, and installed into fresh environments.

The extras `torch`, `ray` and `dev` are gigabytes, so only their requirements are checked; `.venv` and
`.venv-engines` install what is behind them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from helpers import ROOT

import eplb_dump
from scripts.package import build

EPOCH = 1_700_000_000
NAME = f"eplb_dump-{eplb_dump.__version__}"
#: What a wheel holds besides the packages.
METADATA = {"METADATA", "RECORD", "WHEEL", "entry_points.txt"}
LICENSES = {
    "LICENSE",
    *(f"eplb_analyze/report/assets/echarts.{n}" for n in ("LICENSE", "LICENSE-d3", "NOTICE")),
}

#: The main job of an engine's environment: its plugins load, and two ranks record.
RECORD = """
import sys
from importlib.metadata import entry_points
import numpy as np
from eplb_dump import ExpertLoadWriter

for group in ("vllm.general_plugins", "sglang.srt.plugins"):
    (plugin,) = [point for point in entry_points(group=group) if point.name == "eplb_dump"]
    plugin.load()()
writers = [
    ExpertLoadWriter(sys.argv[1], model="moe", num_logical_experts=4, ep_size=2, ep_rank=rank, run_id="r")
    for rank in range(2)
]
for step in range(20):
    for writer in writers:
        writer.record(None, np.full((2, 4), 5), np.tile(np.arange(4), (2, 1)), num_tokens=20)
assert all(writer.close(60) for writer in writers)
"""


def project_files() -> list[str]:
    """The files of a commit of this work tree."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """pytest keeps its own folders of three runs; these are hundreds of megabytes."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def sources(folder: Path) -> tuple[Path, Path]:
    """Two copies of the project, as two people may have it: other paths, modes and times of files."""
    copies = folder / "one", folder / "another person's/checkout"
    for number, copy in enumerate(copies):
        for name in project_files():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
            (copy / name).chmod(0o664 if number else 0o640)
            os.utime(copy / name, (number, 10**9 * number))
    return copies


@pytest.fixture(scope="module")
def packages(sources: tuple[Path, Path]) -> tuple[Path, Path]:
    """The source archive and the wheel."""
    archive, wheel = sorted(
        build(sources[0], sources[0] / "dist", EPOCH), key=lambda file: file.suffix != ".gz"
    )
    assert (archive.name, wheel.name) == (f"{NAME}.tar.gz", f"{NAME}-py3-none-any.whl")
    return archive, wheel


@pytest.fixture(scope="module")
def metadata(packages: tuple[Path, Path]) -> Message:
    with zipfile.ZipFile(packages[1]) as wheel:
        return Parser().parsestr(wheel.read(f"{NAME}.dist-info/METADATA").decode())


def test_two_people_build_the_same_bytes(
    sources: tuple[Path, Path], packages: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    before = os.umask(0o077)
    try:
        again = build(sources[1], sources[1] / "dist", EPOCH)
    finally:
        os.umask(before)
    assert {file.name: file.read_bytes() for file in again} == {
        file.name: file.read_bytes() for file in packages
    }


def test_source_archive_builds_the_same_wheel(packages: tuple[Path, Path], tmp_path: Path) -> None:
    archive, wheel = packages
    subprocess.run(["tar", "-xf", archive, "-C", tmp_path], check=True)
    built = build(tmp_path / NAME, tmp_path / "dist", EPOCH)
    assert [file.read_bytes() for file in built if file.name == wheel.name] == [wheel.read_bytes()]


def test_an_index_would_accept_the_packages(packages: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, packages)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_wheel_holds_both_packages_and_nothing_else(packages: tuple[Path, Path]) -> None:
    ours = {name for name in project_files() if name.startswith(("eplb_dump/", "eplb_analyze/"))}
    assert {"eplb_dump/py.typed", "eplb_analyze/py.typed", "eplb_analyze/report/assets/page.html"} < ours
    with zipfile.ZipFile(packages[1]) as wheel:
        names = wheel.namelist()
        licenses = {name: wheel.read(f"{NAME}.dist-info/licenses/{name}") for name in LICENSES}
    assert len(names) == len(set(names))
    extra = METADATA | {f"licenses/{name}" for name in LICENSES}
    assert set(names) == ours | {f"{NAME}.dist-info/{name}" for name in extra}
    assert licenses == {name: (ROOT / name).read_bytes() for name in LICENSES}


def test_source_archive_holds_no_tests_and_no_recordings(packages: tuple[Path, Path]) -> None:
    with tarfile.open(packages[0]) as tar:
        top = {name.split("/")[1] for name in tar.getnames()}
    assert top == {
        "eplb_dump", "eplb_analyze", "CHANGELOG.md", "LICENSE", "README.md", "PKG-INFO", "pyproject.toml",
        ".gitignore",
    }  # fmt: skip


def test_links_of_the_description_work_outside_the_repository(metadata: Message) -> None:
    links = re.findall(r"\]\(([^)]+)\)", metadata.get_payload())
    assert len(links) > 20
    for link in links:
        found = re.fullmatch(r"https://github\.com/\w+/eplb-dump/(blob|raw)/(v[\d.]+)/([^#]+)(#.*)?", link)
        if found:
            assert found[2] == f"v{eplb_dump.__version__}"
            assert (ROOT / found[3]).exists(), link
            assert (found[1] == "raw") == found[3].endswith((".png", ".svg"))
        else:
            assert link.startswith("https://")
    assert any("/raw/" in link for link in links)


def test_metadata_says_what_a_stranger_looks_for(metadata: Message) -> None:
    assert metadata["Name"] == "eplb-dump"
    assert metadata["Version"] == eplb_dump.__version__
    assert metadata["License-Expression"] == "Apache-2.0 AND BSD-3-Clause"
    labels = {line.split(",")[0] for line in metadata.get_all("Project-URL", [])}
    assert labels == {"Documentation", "Source", "Issues", "Changelog"}
    versions = {line.split(" :: ")[-1] for line in metadata.get_all("Classifier", []) if " 3." in line}
    tested = re.findall(r'"(3\.\d+)"', next(
        line for line in (ROOT / ".github/workflows/ci.yml").read_text().splitlines() if "python: [" in line
    ))  # fmt: skip
    assert versions == set(tested)
    assert metadata["Requires-Python"] == f">={min(tested, key=lambda v: int(v.split('.')[1]))}"


def requirements(metadata: Message, extra: str | None) -> set[str]:
    """The names of the packages that an extra adds, or that are always needed."""
    found = set()
    for line in metadata.get_all("Requires-Dist", []):
        name, _, marker = line.partition(";")
        wanted = re.search(r"extra == '(\w+)'", marker)
        if (wanted[1] if wanted else None) == extra:
            found.add(re.split(r"[<>=!~\[ ]", name)[0])
    return found


def test_extras_add_up(metadata: Message) -> None:
    assert requirements(metadata, None) == {"numpy", "pyarrow"}
    assert requirements(metadata, "analyze") == {"polars", "rich", "typer"}
    assert requirements(metadata, "torch") == {"torch"}
    assert requirements(metadata, "ray") == {"ray"}
    small = ("analyze", "import", "metrics")
    everything = set().union(*(requirements(metadata, extra) for extra in (*small, "torch")))
    assert requirements(metadata, "all") == everything
    assert everything | requirements(metadata, "ray") < requirements(metadata, "dev")


# ---- fresh environments


PINNED = ("-c", f"{ROOT}/constraints.txt")


def install(environment: Path, *requirements: str) -> None:
    command = [
        sys.executable, "-m", "pip", "--python", f"{environment}/bin/python", "install", "--quiet",
        "--disable-pip-version-check", *requirements,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def engine(packages: tuple[Path, Path], folder: Path) -> Path:
    """A fresh environment with the wheel."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "engine"], check=True)
    install(folder / "engine", *PINNED, str(packages[1]))
    return folder / "engine"


@pytest.fixture(scope="module")
def reader(packages: tuple[Path, Path], engine: Path, folder: Path) -> Path:
    """... with what `[analyze]` adds."""
    shutil.copytree(engine, folder / "reader", symlinks=True, copy_function=os.link)
    install(folder / "reader", *PINNED, f"{packages[1]}[analyze]")
    return folder / "reader"


@pytest.fixture(scope="module")
def dump(engine: Path, folder: Path) -> Path:
    """A recording made by the environment of an engine."""
    run(engine, "-c", RECORD, str(folder / "dump"))
    return folder / "dump"


def run(environment: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run Python in a fresh environment, away from the checkout."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "EXPERT_LOAD_DUMP"))}
    result = subprocess.run(
        [f"{environment}/bin/python", "-W", "error", *arguments],
        cwd=environment, env=variables, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == code, result.stdout + result.stderr
    return result


def installed(environment: Path) -> set[str]:
    code = "import importlib.metadata as m; print(*{d.metadata['Name'].lower() for d in m.distributions()})"
    return set(run(environment, "-c", code).stdout.split())


def test_engine_needs_numpy_and_pyarrow_only(engine: Path, dump: Path) -> None:
    assert installed(engine) == {"eplb-dump", "numpy", "pyarrow"}
    sessions = [json.loads(file.read_text()) for file in dump.rglob("session.json")]
    assert [session["writer_version"] for session in sessions] == [eplb_dump.__version__] * 2


def test_program_without_the_reader_says_what_to_install(engine: Path) -> None:
    result = subprocess.run([f"{engine}/bin/eplb-analyze"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "eplb-analyze: error: the reader is not installed: pip install 'eplb-dump[analyze]' "
        "(in a checkout: pip install '.[analyze]')\n"
    )


def test_reader_reads_what_the_engine_recorded(reader: Path, dump: Path, tmp_path: Path) -> None:
    assert not {"torch", "pyyaml", "prometheus-client"} & installed(reader)
    program = ("-m", "eplb_analyze")
    assert run(reader, *program, "--version").stdout == f"eplb-analyze {eplb_dump.__version__}\n"
    summary = json.loads(run(reader, *program, "summary", "--json", str(dump)).stdout)
    assert summary["steps"]["recorded"] == 20
    assert json.loads(run(reader, *program, "check", "--json", str(dump)).stdout)["findings"] == []
    run(reader, *program, "report", "-o", str(tmp_path / "report.html"), str(dump))
    assert "echarts" in (tmp_path / "report.html").read_text()
    missing = run(reader, *program, "serve-metrics", "--once", str(dump), code=2)
    assert "pip install 'eplb-dump[metrics]'" in missing.stderr


def test_small_extras_bring_what_their_commands_need(
    reader: Path, packages: tuple[Path, Path], dump: Path, folder: Path, tmp_path: Path
) -> None:
    larger = folder / "larger"
    shutil.copytree(reader, larger, symlinks=True, copy_function=os.link)
    install(larger, *PINNED, f"{packages[1]}[import,metrics]")
    program = ("-m", "eplb_analyze")
    assert "eplb_" in run(larger, *program, "serve-metrics", "--once", str(dump)).stdout
    placement = tmp_path / "balancer.yaml"
    run(larger, *program, "export", "placement", "--for", "trtllm", "-o", str(placement), str(dump))
    run(larger, "-c", f"import safetensors.numpy, yaml; yaml.safe_load(open({str(placement)!r}))")


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="numpy 1.26 has no wheel for Python 3.13")
def test_oldest_versions_that_the_metadata_allows_work(
    packages: tuple[Path, Path], metadata: Message, folder: Path
) -> None:
    lines = [
        line for line in metadata.get_all("Requires-Dist", []) if "extra" not in line or "'analyze'" in line
    ]
    oldest = [
        f"{name}=={version}.*" for line in lines for name, version in re.findall(r"^(\w+)>=([\d.]+)", line)
    ]
    assert len(oldest) == len(lines) == 5
    environment = folder / "oldest"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    install(environment, *oldest, f"{packages[1]}[analyze]")
    # Newer versions of what these need, such as click, warn of their use.
    run(environment, "-W", "ignore", "-c", RECORD, "dump")
    program = ("-W", "ignore", "-m", "eplb_analyze")
    for command in ("summary", "check", "replay", "report -o report.html"):
        run(environment, *program, *command.split(), "dump")
