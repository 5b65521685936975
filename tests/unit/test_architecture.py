"""The rule of CONTRIBUTING.md: a package imports only from rows above it, and there is no circle."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers import ROOT

#: A package or module imports only from rows above it. Those in one row do not import each other.
ROWS = [
    {"eplb_dump.format"},
    {
        "eplb_analyze.distinct",
        "eplb_analyze.errors",
        "eplb_analyze.json_report",
        "eplb_analyze.text",
        "eplb_analyze.parallel",
    },
    {
        "eplb_analyze.forks",
        "eplb_analyze.processes",
        "eplb_analyze.storage",
        "eplb_analyze.metrics",
        "eplb_analyze.policies",
    },
    {"eplb_analyze.atomic", "eplb_analyze.dispatch", "eplb_analyze.sessions"},
    {"eplb_analyze.reader"},
    {"eplb_analyze.analysis"},
    {"eplb_analyze.live", "eplb_analyze.replay"},
    {"eplb_analyze.transfer", "eplb_analyze.report"},
    {"eplb_analyze.batch"},
    {"eplb_analyze.cli"},
    {"eplb_analyze", "eplb_analyze.__main__"},
]
WRITER_ROWS = [
    {"eplb_dump.format"},
    {
        "eplb_dump.arguments",
        "eplb_dump.device",
        "eplb_dump.latch",
        "eplb_dump.process",
        "eplb_dump.start",
    },
    {"eplb_dump.budget", "eplb_dump.events", "eplb_dump.rendezvous"},
    {"eplb_dump.ring"},
    {"eplb_dump.staging"},
    {"eplb_dump.encoder"},
    {"eplb_dump.accounting"},
    {"eplb_dump.metrics_file"},
    {"eplb_dump.background"},
    {"eplb_dump.writer"},
    {"eplb_dump.counter", "eplb_dump.engines"},
    {"eplb_dump"},
]
THIRD_PARTY = {
    "eplb_dump": {"numpy", "pyarrow"},
    "eplb_analyze": {"numpy", "pyarrow", "polars", "rich", "typer"},
}
#: Modules that run only where these packages are installed.
OPTIONAL = {
    "eplb_dump.counter": {"torch"},
    "eplb_dump.engines.vllm": {"torch", "vllm"},
    "eplb_dump.engines.sglang": {"torch", "sglang"},
    "eplb_analyze.transfer.importers.torch_files": {"torch"},
    "eplb_analyze.transfer.importers.placement_files": {"yaml"},
    "eplb_analyze.transfer.importers.trtllm": {"safetensors"},
    "eplb_analyze.batch.executors": {"ray"},
    "eplb_analyze.live.prometheus": {"prometheus_client"},
}


def modules() -> dict[str, Path]:
    found = {}
    for package in ("eplb_dump", "eplb_analyze"):
        for path in sorted((ROOT / package).rglob("*.py")):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()
each_module = pytest.mark.parametrize("name", MODULES)


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text())


@functools.cache
def imports(name: str) -> set[str]:
    """The modules that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= below or {node.module}
    return found


def our_imports(name: str) -> set[str]:
    return imports(name) & MODULES.keys()


def row_of(name: str, rows: list[set[str]]) -> tuple[int, str]:
    """The row of a module, and the package or module of the table that it belongs to."""
    for number, row in enumerate(rows):
        for package in row - {"eplb_dump", "eplb_analyze"}:
            if name == package or name.startswith(f"{package}."):
                return number, package
    assert name in rows[-1], f"{name} is in no row of the table"
    return len(rows) - 1, name


@each_module
def test_imports_come_from_rows_above(name: str) -> None:
    rows = ROWS if name.startswith("eplb_analyze") else WRITER_ROWS
    number, package = row_of(name, rows)
    for other in our_imports(name):
        above, other_package = row_of(other, rows)
        assert other_package == package or above < number, f"{name} imports {other}"


def test_no_circle() -> None:
    graph = {name: our_imports(name) - {name} for name in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@each_module
def test_third_party_imports_are_declared(name: str) -> None:
    top = {other.split(".")[0] for other in imports(name)}
    foreign = top - set(sys.stdlib_module_names) - {"eplb_dump", "eplb_analyze"}
    assert foreign <= THIRD_PARTY[name.split(".", maxsplit=1)[0]] | OPTIONAL.get(name, set())


#: Modules that rename or remove without a sync, and why they may.
UNSYNCED = {
    "eplb_dump.format.files": "it is the one that syncs",
    "eplb_dump.rendezvous": "an engine waits for it; the sealer syncs all folders above its session",
    "eplb_analyze.atomic": "temporary files, which no reader looks at",
    "eplb_analyze.storage.bucket": "objects",
}


@each_module
def test_files_are_renamed_and_removed_in_one_module(name: str) -> None:
    """:mod:`eplb_dump.format.files` syncs the folder; without that, a power cut undoes it."""
    if name in UNSYNCED:
        return
    called = [node.func for node in ast.walk(tree(name)) if isinstance(node, ast.Call)]
    calls = {ast.unparse(func) for func in called if isinstance(func, ast.Attribute)}
    calls -= {"cast(Remote, path).unlink"}  # an object in a bucket
    assert not {call for call in calls if call.endswith((".unlink", ".rename"))}
    assert not calls & {"os.replace", "os.remove", "os.link", "shutil.move"}


@each_module
def test_module_says_what_lives_there(name: str) -> None:
    assert ast.get_docstring(tree(name)), name


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import eplb_dump; eplb_dump.ExpertLoadWriter", ["torch", "polars", "typer", "rich"]),
        ("import eplb_dump.engines.vllm as e; e.register()", ["torch", "numpy", "pyarrow", "vllm"]),
        ("import eplb_dump.engines.sglang as e; e.register()", ["torch", "numpy", "pyarrow", "sglang"]),
        ("import eplb_analyze.cli.app", ["torch", "polars", "pyarrow", "numpy"]),
        ("import eplb_analyze; eplb_analyze.open_run", ["torch", "typer"]),
        ("import eplb_analyze.transfer.importers.import_dump", ["torch", "yaml", "polars", "typer"]),
    ],
)
def test_what_is_not_imported(statement: str, forbidden: list[str]) -> None:
    code = f"import sys; {statement}; print([m for m in {forbidden!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
