"""The map of CONTRIBUTING.md is kept: what each module imports, and what a user's machine must have."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE = ["format", "frames", "journal", "sealing", "staging", "rendezvous", "background", "writer"]
OFFLINE = [
    "errors",
    "places",
    "segments",
    "dump",
    "blocks",
    "placements",
    "metrics",
    "bootstrap",
    "run",
    "completeness",
    "stretches",
    "configuration",
    "summary",
    "layer",
    "ranks",
    "timeline",
    "placement",
    "experts",
    "traffic",
    "rearrangements",
    "compare",
    "check",
    "seal",
    "losses",
    "torch_cpu",
    "rebalancing",
    "policies",
    "settings",
    "playback",
    "replay",
    "advise",
    "export",
    "importing",
    "copying",
    "compacting",
    "report.writing",
    "executors",
    "postmortem",
    "banner",
    "growing",
    "following",
    "window",
    "watch",
]


def engine(*names: str) -> set[str]:
    return {f"eplb_dump.{name}" for name in names}


def offline(*names: str) -> set[str]:
    return {f"eplb_analyze.{name}" for name in names}


SHARED = engine("format", "frames", "journal", "sealing")
LIBRARY = offline(*OFFLINE)
#: Module to the modules of ours that it may import, anywhere in it.
ALLOWED: dict[str, set[str]] = {
    "eplb_dump.format": set(),
    "eplb_dump.frames": engine("format"),
    "eplb_dump.journal": engine("format", "frames"),
    "eplb_dump.sealing": engine("format", "frames", "journal"),
    "eplb_dump.staging": set(),
    "eplb_dump.rendezvous": engine("format"),
    "eplb_dump.background": engine("format", "frames", "journal", "sealing", "staging"),
    "eplb_dump.writer": engine(*ENGINE) | {"eplb_dump"},
    "eplb_dump.counter": engine("writer"),
    "eplb_dump.engines": set(),
    "eplb_dump.engines.common": engine("writer"),
    "eplb_dump.engines.vllm": engine("writer", "engines.common"),
    "eplb_dump.engines.sglang": engine("writer", "engines.common"),
    "eplb_dump": engine("format", "writer", "counter"),
    "eplb_analyze": offline("errors", "run"),
    "eplb_analyze.errors": set(),
    "eplb_analyze.places": offline("errors"),
    "eplb_analyze.segments": SHARED | offline("places"),
    "eplb_analyze.dump": SHARED | offline("places", "segments", "errors"),
    "eplb_analyze.blocks": SHARED | offline("dump", "places", "segments"),
    "eplb_analyze.placements": SHARED | offline("blocks", "dump", "errors", "places", "segments"),
    "eplb_analyze.metrics": set(),
    "eplb_analyze.losses": SHARED | offline("metrics"),
    "eplb_analyze.bootstrap": set(),
    "eplb_analyze.torch_cpu": set(),
    "eplb_analyze.rebalancing": offline("torch_cpu"),
    "eplb_analyze.policies": offline("errors", "rebalancing"),
    "eplb_analyze.run": SHARED
    | offline("blocks", "dump", "errors", "frames", "metrics", "placements", "places", "segments"),
    "eplb_analyze.frames": SHARED | offline("blocks", "metrics", "run"),
    "eplb_analyze.completeness": SHARED | offline("blocks", "errors"),
    "eplb_analyze.stretches": SHARED | offline("blocks", "completeness", "run"),
    "eplb_analyze.configuration": SHARED | offline("blocks", "completeness", "errors", "run", "stretches"),
    "eplb_analyze.settings": SHARED | offline("errors", "placements", "run"),
    "eplb_analyze.playback": SHARED
    | offline("blocks", "errors", "metrics", "placements", "policies", "run", "settings"),
    "eplb_analyze.replay": SHARED
    | offline("completeness", "errors", "playback", "policies", "run", "settings", "stretches"),
    "eplb_analyze.advise": SHARED | offline("bootstrap", "errors", "playback", "replay", "run", "settings"),
    "eplb_analyze.growing": SHARED | offline("segments"),
    "eplb_analyze.following": SHARED | offline("growing", "segments"),
    "eplb_analyze.window": SHARED | offline("following", "metrics"),
    "eplb_analyze.watch": SHARED
    | offline("dump", "errors", "following", "losses", "metrics", "placements", "places", "run", "window"),
    "eplb_analyze.output": offline("errors"),
    "eplb_analyze.seal": SHARED | offline("dump", "errors", "places"),
    "eplb_analyze.entry": {"eplb_analyze.cli"},
    "eplb_analyze.cli": offline("errors", "output")
    | {f"eplb_analyze.commands.{path.stem}" for path in (ROOT / "eplb_analyze/commands").glob("*.py")},
    "eplb_analyze.commands": set(),
}
FIGURES = (
    "summary",
    "layer",
    "ranks",
    "timeline",
    "placement",
    "experts",
    "traffic",
    "rearrangements",
    "compare",
    "check",
    "export",
    "report.writing",
)
for _name in FIGURES:
    ALLOWED[f"eplb_analyze.{_name}"] = SHARED | LIBRARY - offline(*FIGURES)
#: Above the figures of single runs.
ALLOWED["eplb_analyze.banner"] = SHARED | offline("blocks", "errors", "output", "run", "settings", "summary")
ALLOWED["eplb_analyze.executors"] = offline("errors")
ALLOWED["eplb_analyze.postmortem"] = SHARED | LIBRARY
#: A module a format; none knows of another.
EXPORTERS = ("sglang", "trtllm", "vllm_ascend", "vllm_mapping", "plain")
ALLOWED["eplb_analyze.exporters"] = offline("errors")
ALLOWED["eplb_analyze.exporters.files"] = offline("exporters", "places")
ALLOWED["eplb_analyze.exporters.placement"] = SHARED | offline("exporters")
ALLOWED["eplb_analyze.exporters.loads"] = SHARED | offline("blocks", "run")
for _name in EXPORTERS:
    ALLOWED[f"eplb_analyze.exporters.{_name}"] = SHARED | offline("exporters", "exporters.placement")
ALLOWED["eplb_analyze.exporters.sglang"] |= offline("policies")
ALLOWED["eplb_analyze.export"] |= offline("placement", "policies", "exporters")
ALLOWED["eplb_analyze.export"] |= {
    f"eplb_analyze.exporters.{name}" for name in (*EXPORTERS, "files", "placement", "loads")
}
#: Above the commands' figures: it shows them.
REPORT = offline("report.loads", "report.words", "report.document", "report.page")
ALLOWED["eplb_analyze.report"] = set()
ALLOWED["eplb_analyze.report.loads"] = SHARED | LIBRARY - offline(*FIGURES)
ALLOWED["eplb_analyze.report.words"] = LIBRARY - offline("report.writing") | offline("output")
ALLOWED["eplb_analyze.report.document"] = (
    SHARED | REPORT | LIBRARY - offline("report.writing") | offline("output")
)
ALLOWED["eplb_analyze.report.page"] = offline("output")
ALLOWED["eplb_analyze.report.writing"] = LIBRARY | REPORT | offline("exporters.files")
#: A module a system; none knows of another. ``reading`` is what they return, ``files`` how they read.
IMPORTERS = ("sglang", "trtllm", "vllm", "megatron", "arrays", "placement_files")
READING = offline("errors", "importers.reading")
ALLOWED["eplb_analyze.importers"] = set()
ALLOWED["eplb_analyze.importers.reading"] = SHARED | offline("errors")
ALLOWED["eplb_analyze.importers.files"] = SHARED | READING | offline("segments")
ALLOWED["eplb_analyze.importers.torch_files"] = READING | offline("importers.files")
for _name in IMPORTERS:
    ALLOWED[f"eplb_analyze.importers.{_name}"] = (
        SHARED | READING | offline("importers.files", "importers.torch_files")
    )
ALLOWED["eplb_analyze.importers.formats"] = (
    READING
    | offline("importers.files", "importers.torch_files")
    | {f"eplb_analyze.importers.{n}" for n in IMPORTERS}
)
ALLOWED["eplb_analyze.importers.resolve"] = SHARED | READING | offline("importers.placement_files")
ALLOWED["eplb_analyze.importers.writing"] = (
    SHARED | READING | offline("importers.resolve", "newrun") | {"eplb_dump"}
)
ALLOWED["eplb_analyze.newrun"] = SHARED | offline("errors")
ALLOWED["eplb_analyze.copying"] = SHARED | offline("dump", "errors", "places", "run", "segments")
ALLOWED["eplb_analyze.compacting"] = (
    SHARED | offline("blocks", "errors", "newrun", "places", "run", "segments", "summary") | {"eplb_dump"}
)
ALLOWED["eplb_analyze.importing"] = (
    SHARED | READING | offline("importers.formats", "importers.resolve", "importers.writing")
)
#: What runs only where these already are.
INSIDE = {
    "eplb_dump.counter": {"torch"},
    "eplb_dump.engines.vllm": {"torch", "vllm"},
    "eplb_dump.engines.sglang": {"torch", "sglang"},
    "eplb_analyze.importers.torch_files": {"torch"},
    "eplb_analyze.importers.placement_files": {"yaml"},
    "eplb_analyze.executors": {"ray"},
}


def modules() -> list[tuple[str, Path]]:
    found = []
    for package in ("eplb_dump", "eplb_analyze"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def imports(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = ROOT / Path(*node.module.split("."), f"{alias.name}.py")
                names.add(f"{node.module}.{alias.name}" if submodule.exists() else node.module)
    return names


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_keep_to_the_map(name: str, path: Path) -> None:
    found = imports(ast.parse(path.read_text()))
    ours = {n for n in found if n.split(".")[0] in ("eplb_dump", "eplb_analyze")}
    if name.startswith("eplb_analyze.commands."):
        assert ours <= LIBRARY | offline("output", "commands.options") | SHARED
    else:
        assert ours <= ALLOWED[name], f"{name} may not import {ours - ALLOWED[name]}"
    top = {n.split(".")[0] for n in found}
    third_party = top - set(sys.stdlib_module_names) - {"eplb_dump", "eplb_analyze"}
    allowed = (
        {"numpy", "pyarrow"}
        if name.startswith("eplb_dump")
        else {"numpy", "pyarrow", "polars", "rich", "typer"}
    )
    assert third_party <= allowed | INSIDE.get(name, set())


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_every_module_says_what_lives_there(name: str, path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text, name


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import eplb_dump; eplb_dump.ExpertLoadWriter", ["torch", "polars", "typer", "rich"]),
        ("import eplb_dump.engines.vllm as e; e.register()", ["torch", "numpy", "pyarrow", "vllm"]),
        ("import eplb_dump.engines.sglang as e; e.register()", ["torch", "numpy", "pyarrow", "sglang"]),
        ("import eplb_analyze.cli", ["torch", "polars", "pyarrow", "numpy"]),
        ("import eplb_analyze; eplb_analyze.open_run", ["torch", "typer"]),
        ("import eplb_analyze.importing", ["torch", "yaml", "polars", "typer"]),
    ],
)
def test_what_is_not_imported(statement: str, forbidden: list[str]) -> None:
    code = f"import sys; {statement}; print([m for m in {forbidden!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
