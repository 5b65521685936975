"""The examples in README and docs run, links resolve, and every command is documented and has help."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import ROOT, cli, write
from typer.main import get_command

from eplb_analyze.analysis.check import check_run
from eplb_analyze.cli.app import program
from scripts import demo

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
INCIDENT = "docs/investigate/incident.md"
#: Lines that CI runs anyway, that take a minute (the demo trains a model), or that need an engine.
NOT_RUN_HERE = (
    "sh scripts/", "pip install", "EXPERT_LOAD_DUMP_DIR=/dumps ", "vllm serve ", "cd /path/to/",
    "python -m examples.",
)  # fmt: skip


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    return sorted(get_command(program()).commands)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dump of the README, the arrays that docs/record/import.md imports, and two dumps of 40 steps."""
    where = tmp_path_factory.mktemp("docs")
    code = next(b for b in blocks(ROOT / "README.md", "python") if "ExpertLoadWriter" in b)
    imported = blocks(ROOT / "docs/record/import.md", "python")
    for part in (code, *imported):
        subprocess.run([sys.executable, "-W", "error", "-c", part], cwd=where, check=True)
    for dump in ("old-dump", "new-dump"):
        write(where / dump, steps=40)
    return where


@pytest.fixture(scope="module")
def incident(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recording that docs/investigate/incident.md investigates, made by its own command."""
    where = tmp_path_factory.mktemp("incident")
    command = next(line for block in blocks(ROOT / INCIDENT, "sh") for line in block.splitlines())
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=where, env=environment, check=True)
    return where


def run(folder: Path, *arguments: str) -> str:
    """What a command prints; ours in this process, as `test_command_line` starts each as a program."""
    if arguments[0] == "eplb-analyze":
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            done = cli(*arguments[1:])
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k != "EXPERT_LOAD_DUMP_DIR"}
    result = subprocess.run(
        arguments, cwd=folder, capture_output=True, text=True, check=False, timeout=120,
        env={**environment, "PATH": path, "PYTHONWARNINGS": "error"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def python_examples() -> list[tuple[str, str]]:
    return [(name(p), code) for p in PAGES for code in blocks(p, "python")]


@pytest.mark.parametrize(("page", "code"), python_examples())
def test_python_example_runs(folder: Path, tmp_path: Path, page: str, code: str) -> None:
    writes = "ExpertLoadWriter(" in code
    out = run(tmp_path if writes else folder, sys.executable, "-W", "error", "-c", code)
    assert out.strip() or page == "README.md"


def shell_lines() -> list[tuple[str, str]]:
    lines = [(name(p), line) for p in PAGES for b in blocks(p, "sh") for line in b.splitlines()]
    return [(page, line) for page, line in lines if not line.startswith(NOT_RUN_HERE)]


@pytest.mark.parametrize(("page", "line"), shell_lines())
def test_shell_example_runs(request: pytest.FixtureRequest, page: str, line: str) -> None:
    folder = request.getfixturevalue("incident" if page == INCIDENT else "folder")
    out = run(folder, *shlex.split(line))
    if "--json" in line:
        json.loads(out)
    assert out


def test_the_incident_is_the_planted_one(incident: Path) -> None:
    """The walk-through names a layer, an expert, a rearrangement and their steps; the recording has them."""
    found = json.loads(run(incident, "eplb-analyze", "experts", "--layer", "12", "--json", "incident"))
    hot = [expert for expert in found["experts"] if expert["verdict"] != "never"]
    assert [(expert["logical"], expert["first_hot_step"]) for expert in hot] == [(77, 1000)]
    moved = json.loads(run(incident, "eplb-analyze", "rearrangements", "--json", "incident"))
    assert [(r["first_step"], r["verdict"]) for r in moved["rearrangements"]] == [(2000, "helped")]


def alike(shown: list[str], printed: list[str]) -> None:
    """The same words, and figures that another processor's last bits can explain."""
    number = re.compile(r"\d+(?:\.\d+)?")

    def parts(lines: list[str]) -> tuple[str, list[float]]:
        text = re.sub(r"(?<=\d),(?=\d)", "", "\n".join(lines))
        return number.sub("#", text), [float(figure) for figure in number.findall(text)]

    (words, figures), (expected_words, expected_figures) = parts(shown), parts(printed)
    assert words == expected_words, "run `python -m scripts.demo`"
    assert figures == pytest.approx(expected_figures, rel=0.05, abs=0.02), "run `python -m scripts.demo`"


def test_demo_shows_what_the_commands_print(incident: Path) -> None:
    rows = demo.story(incident, demo.log_lines(incident / "incident"))
    alike(demo.text_of(demo.PICTURE.read_text()), [row.text.plain.rstrip() for row in rows])
    readme = (ROOT / "README.md").read_text()
    shown = demo.renewed_readme(readme, rows)
    alike(readme.splitlines(), shown.splitlines())
    assert all(len(lines) > 2 for lines in demo.before_and_after(rows).values())


def test_demo_needs_nothing_but_a_browser_and_ends_on_the_answer() -> None:
    svg = demo.PICTURE.read_text()
    assert len(svg) < 100_000
    assert not re.search(r"<script|@import|@font-face|href|url\((?!#)", svg)
    last = max(float(seconds) for seconds in re.findall(r"animation-duration:([\d.]+)s", svg))
    assert 20 < last < demo.SECONDS
    assert "infinite" not in svg


def test_scripts_named_in_the_readme_exist() -> None:
    named = [line for b in blocks(ROOT / "README.md", "sh") for line in b.splitlines()]
    scripts = [line.split()[1] for line in named if line.startswith("sh ")]
    assert len(scripts) == 2
    for script in scripts:
        subprocess.run(["sh", "-n", str(ROOT / script)], check=True)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        words = re.sub(r"\]\([^)]*\)|[`\[\]*]", "", heading).strip().lower()
        slug = re.sub(r"[^\w -]", "", words).replace(" ", "-")
        found.add(slug)
        found.add(re.sub("-+", "-", slug))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
        if target.startswith("https://"):
            continue
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def test_figures_in_the_comparison_are_those_of_the_pages_that_it_links_to() -> None:
    page = ROOT / "docs/comparison.md"
    links = re.findall(r"\[([^]]*\d[^]]*)\]\((?!https)([^)#]+)", page.read_text())
    assert len(links) > 5
    for figure, target in links:
        assert figure in (page.parent / target).read_text(), f"{figure}: not in {target}"


class Links(HTMLParser):
    """The links and the anchors of an HTML page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for attribute, value in attrs:
            if attribute in ("href", "src") and value:
                self.links.add(value)
            elif attribute in ("id", "name") and value:
                self.anchors.add(value)


def test_site_has_no_dead_links(tmp_path: Path) -> None:
    """Also those of the navigation and of docstrings, which no Markdown page holds."""
    run(ROOT, "mkdocs", "build", "--strict", "--site-dir", str(tmp_path))
    # 404.html is for a server's root.
    pages = {page: Links(page) for page in tmp_path.rglob("*.html") if page.name != "404.html"}
    assert len(pages) >= len(list((ROOT / "docs").rglob("*.md")))
    dead = []
    for page, found in pages.items():
        for link in found.links:
            address = urllib.parse.urlsplit(link)
            if address.scheme in ("https", "data"):
                continue
            file = (page.parent / urllib.parse.unquote(address.path)).resolve() if address.path else page
            file = file / "index.html" if file.is_dir() else file
            anchor = urllib.parse.unquote(address.fragment)
            known = pages[file].anchors if file in pages else set()
            if address.scheme or not file.exists() or (anchor and anchor not in known):
                dead.append((page.relative_to(tmp_path).as_posix(), link))
    assert dead == []


def test_pages_named_in_code_and_text_exist() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [
        ROOT / line for line in listed.stdout.splitlines() if line.endswith((".py", ".md", ".sh", ".toml"))
    ]
    named = {
        page for file in files if file.exists() for page in re.findall(r"docs/[\w/-]+\.md", file.read_text())
    }
    assert len(named) > 10
    assert sorted(page for page in named if not (ROOT / page).exists()) == []


@pytest.mark.parametrize("command", commands())
def test_command_is_documented_and_has_help(command: str) -> None:
    assert f"\n## {command}\n" in (ROOT / "docs/cli.md").read_text()
    help_text = run(ROOT, "eplb-analyze", command, "--help")
    assert len(help_text.split("\n\n")[1].strip()) > 20
    assert "--json" in help_text


def test_every_finding_is_documented() -> None:
    source = "".join(p.read_text() for p in (ROOT / "eplb_analyze").rglob("*.py"))
    codes = set(re.findall(r'Finding\(\s*"\w+",\s*f?"(\w+)"', source)) | {"dropped_steps", "rejected_steps"}
    assert len(codes) > 15
    documented = (ROOT / "docs/cli.md").read_text()
    assert [c for c in sorted(codes) if f"`{c}`" not in documented] == []
    assert check_run.__doc__
