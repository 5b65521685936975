"""The names that ``import eplb_analyze`` offers."""

from __future__ import annotations

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
from helpers import ROOT, write

import eplb_analyze
import eplb_dump


def test_every_public_name_can_be_imported_and_is_listed() -> None:
    assert dir(eplb_analyze) == sorted(eplb_analyze.__all__)
    for name in eplb_analyze.__all__:
        assert getattr(eplb_analyze, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'open_rum'"):
        _ = eplb_analyze.open_rum


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "eplb_analyze/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = [
        alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert sorted(filter(None, imported)) == sorted(eplb_analyze.__all__)


def test_the_library_page_names_only_public_names() -> None:
    named = re.findall(r"eplb_analyze\.(\w+)", (ROOT / "docs/library.md").read_text())
    assert set(named) <= set(eplb_analyze.__all__)


def test_the_api_page_has_every_public_name() -> None:
    documented = re.findall(r"^::: (\w+)\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    for module in (eplb_analyze, eplb_dump):
        values = {"FORMAT_VERSION", "__version__"}
        assert {name for package, name in documented if package == module.__name__} == set(
            module.__all__
        ) - values


def test_every_public_name_has_a_docstring() -> None:
    """Functions, classes, and their methods and properties; values have a comment ``#:``."""
    missing, values = [], []
    for module in (eplb_analyze, eplb_dump):
        for name in module.__all__:
            value = getattr(module, name)
            if not (inspect.isclass(value) or inspect.isfunction(value)):
                values.append(name)
                continue
            written = value.__doc__ or ""
            if not written or written.startswith(f"{name}("):  # as a dataclass without one gets
                missing.append(name)
            members = vars(value).items() if inspect.isclass(value) else ()
            for member, item in members:
                function = (
                    getattr(item, "fget", None)
                    or getattr(item, "func", None)
                    or getattr(item, "__func__", item)
                )
                public = not member.startswith("_") and inspect.isfunction(function)
                if public and not inspect.getdoc(function):
                    missing.append(f"{name}.{member}")
    assert missing == []
    sources = [
        path.read_text()
        for package in ("eplb_analyze", "eplb_dump")
        for path in (ROOT / package).rglob("*.py")
    ]
    for name in values:
        assert any(re.search(rf"^#: .+\n{name}\b", source, re.MULTILINE) for source in sources), name


def test_names_that_the_docs_import_have_a_docstring() -> None:
    pages = [page.read_text() for page in (ROOT / "docs").rglob("*.md")]
    imports = {
        (module, name)
        for page in pages
        for module, names in re.findall(r"^from (eplb_\S+) import ([\w, ]+)$", page, re.MULTILINE)
        for name in names.split(", ")
    }
    assert len(imports) > 10
    found = {(module, name): getattr(import_module(module), name) for module, name in imports}
    assert [key for key, value in found.items() if callable(value) and not value.__doc__] == []


def test_repr_of_a_run_says_what_it_is(tmp_path: Path) -> None:
    write(tmp_path, ranks=2, steps=40, run_id="night", model="moe/large")
    assert repr(eplb_analyze.open_run(tmp_path)) == "<Run night of moe/large: 2 ranks, steps 0-39, 2 layers>"
