"""Writes docs/json.md: the keys of every JSON document, by the report classes and by real output.

Run ``python tests/support/json_page.py`` after a change of a report. The meaning of a key is the first of:

1. the comment ``#:`` above the key in a ``to_json`` that names its keys,
2. the comment ``#:`` above its field, its text under ``Attributes:`` in the docstring of the class, or the
   docstring of its property,
3. what the key means in all documents: :mod:`json_words`.
"""

from __future__ import annotations

import ast
import enum
import functools
import importlib
import inspect
import json
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from command_lines import ARGUMENTS
from helpers import ROOT, cli, write
from json_words import WORDS

from eplb_analyze.json_report import SCHEMA_VERSION, time_key

PAGE = ROOT / "docs/json.md"
RENEW = "python tests/support/json_page.py"
#: The report of each command.
REPORTS = {
    "summary": "analysis.summary_report.Summary",
    "runs": "batch.runs.RunList",
    "watch": "live.snapshot.Snapshot",
    "serve-metrics": "live.metric_families.MetricsReport",
    "report": "report.write.WrittenReport",
    "layer": "analysis.layer.LayerReport",
    "experts": "analysis.experts.ExpertReport",
    "experts of sums per minute": "analysis.experts_minutes.MinuteExperts",
    "ranks": "analysis.ranks.RankReport",
    "timeline": "analysis.timeline_report.Timeline",
    "placement": "analysis.placement.PlacementReport",
    "traffic": "analysis.traffic.TrafficReport",
    "rearrangements": "analysis.rearrangements.RearrangementReport",
    "compare": "analysis.compare.Comparison",
    "replay": "replay.replay.Replay",
    "advise": "replay.advice.Advice",
    "postmortem": "batch.comparison.Postmortem",
    "check": "analysis.check.CheckReport",
    "import": "transfer.importers.import_dump.ImportReport",
    "export placement": "transfer.exporters.placements.PlacementExport",
    "export loads": "transfer.exporters.loads.LoadExport",
    "export trace": "transfer.exporters.trace.TraceExport",
    "copy": "transfer.copy.CopyReport",
    "compact": "transfer.compact.CompactReport",
    "recover": "transfer.recover.RecoverReport",
    "prune": "transfer.retention.report.PruneReport",
}
_PLAIN = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "None": "null",
    "Any": "any",
}
#: Stands in a type for the class of its objects.
LINK = "\0"
_LISTS = ("list", "tuple", "Sequence", "frozenset", "set")


@dataclass
class Key:
    """One key of an object: its type in words, its meaning, and the class of the objects in it."""

    kind: str = ""
    text: str = ""
    of: type | None = None
    #: Its keys are data, for example the names of phases.
    is_map: bool = False


@dataclass
class Section:
    """The keys of a class's objects, in order."""

    name: str
    intro: str = ""
    keys: dict[str, Key] = field(default_factory=dict)
    #: Keys that real objects have.
    seen: set[str] = field(default_factory=set)


class Page:
    """Sections by class, found from the reports on, and completed by real documents."""

    def __init__(self) -> None:
        self.sections: dict[type, Section] = {}

    def section(self, cls: type) -> Section:
        if cls not in self.sections:
            self.sections[cls] = Section(cls.__name__, _intro(cls))
            self.sections[cls].keys = _timed(_keys(cls))
            for key in self.sections[cls].keys.values():
                if key.of is not None:
                    self.section(key.of)
        return self.sections[cls]

    def title(self, cls: type) -> str:
        """The class's name, with its module if several have this name."""
        several = sum(other.__name__ == cls.__name__ for other in self.sections) > 1
        return f"{cls.__name__} of {cls.__module__.rpartition('.')[2]}" if several else cls.__name__

    def table(self, section: Section) -> Iterator[str]:
        if section.intro:
            yield f"{section.intro}\n"
        yield "| key | type | meaning |\n| --- | --- | --- |"
        # A field that no real object has is left out by `to_json`.
        known = {n: key for n, key in section.keys.items() if not section.seen or _root(n) in section.seen}
        roots = [_root(name) for name in known]
        for name, key in sorted(known.items(), key=lambda item: roots.index(_root(item[0]))):
            kind = key.kind
            if key.of is not None:
                title = self.title(key.of)
                kind = kind.replace(LINK, f"[{title}](#{title.lower().replace(' ', '-')})")
            word = re.split(r"\.|\[\]\.?", name)[-1]
            yield f"| `{name}` | {kind} | {key.text or _plain(WORDS.get(word, ''))} |"
        yield ""

    def observe(self, section: Section, value: dict[str, Any], prefix: str = "") -> None:
        """Add the keys of a real object that the classes do not show."""
        for name, item in value.items():
            section.seen.add(prefix + name)
            step = next((one for one in value if time_key(one, value[one]) == name), None)
            unknown = Key(_kind_of(item)) if step is None else Key("string or null", _time_of(step))
            key = section.keys.setdefault(prefix + name, unknown)
            if not key.kind or key.kind == "null":
                key.kind = _kind_of(item)
            items = list(item.values()) if key.is_map and isinstance(item, dict) else [item]
            for one in items:
                self._observe_item(section, key, one, prefix + name)

    def _observe_item(self, section: Section, key: Key, item: Any, name: str) -> None:
        if isinstance(item, list):
            for one in item:
                self._observe_item(section, key, one, f"{name}[]")
        elif isinstance(item, dict) and key.of is not None:
            self.observe(self.section(key.of), item)
        elif isinstance(item, dict) and not key.is_map:
            self.observe(section, item, f"{name}.")


def _timed(keys: dict[str, Key]) -> dict[str, Key]:
    """The keys with those of clock times, which the command line puts beside steps."""
    found: dict[str, Key] = {}
    for name, key in keys.items():
        found[name] = key
        prefix, _, word = name.rpartition(".")
        within = f"{prefix}." if prefix else ""
        beside = time_key(word) if key.kind.removesuffix(" or null") == "integer" else None
        states_times = f"{within}since" in keys and word != "since"
        if beside is not None and within + beside not in keys and not states_times:
            found[within + beside] = Key("string or null", _time_of(word))
    return found


def _time_of(step: str) -> str:
    return f"The clock time of `{step}`."


def _root(name: str) -> str:
    return re.split(r"\.|\[\]", name)[0]


def _kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    names = {int: "integer", float: "number", str: "string", dict: "object", list: "list"}
    return names.get(type(value), "null")


@functools.cache
def _sources(cls: type) -> list[tuple[type, list[str], ast.ClassDef]]:
    """The classes of a report, bases first, with their lines and syntax trees."""
    found = []
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("eplb_"):
            text = textwrap.dedent(inspect.getsource(base))
            tree = ast.parse(text).body[0]
            assert isinstance(tree, ast.ClassDef)
            found.append((base, text.splitlines(), tree))
    return found


def _comment(lines: list[str], line: int) -> str:
    """The comment ``#:`` above a line (from 1)."""
    found = []
    for text in reversed(lines[: line - 1]):
        stripped = text.strip()
        if not stripped.startswith("#:"):
            break
        found.append(stripped.removeprefix("#:").strip())
    return " ".join(reversed(found))


def _intro(cls: type) -> str:
    text = inspect.cleandoc(cls.__doc__ or "")
    return "" if text.startswith(f"{cls.__name__}(") else _plain(text.split("\n\n")[0])


def _attributes(cls: type) -> dict[str, str]:
    _, _, block = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    entries: dict[str, str] = {}
    names: list[str] = []
    for line in block.splitlines():
        match = re.match(r"    ((?:\w+)(?:, \w+)*): (.*)", line)
        if match:
            names = match[1].split(", ")
            entries |= dict.fromkeys(names, match[2])
        elif names and line.startswith("      "):
            entries |= {name: f"{entries[name]} {line.strip()}" for name in names}
        elif line and not line.startswith(" "):
            break
    return entries


def _plain(text: str) -> str:
    """A docstring or comment as Markdown of one line."""
    text = re.sub(r":\w+:`~?([^`<]*?)(?: <[^>]*>)?`", lambda match: f"`{match[1].rsplit('.', 1)[-1]}`", text)
    text = re.sub(r"\bNone\b", "null", text)
    text = " ".join(text.replace("``", "`").replace("|", "\\|").split())
    return text[:1].upper() + text[1:]


def _members(cls: type) -> dict[str, tuple[str, str, type]]:
    """Annotation, meaning and defining class of each field and property."""
    found: dict[str, tuple[str, str, type]] = {}
    for base, lines, tree in _sources(cls):
        attributes = _attributes(base)
        for node in tree.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                text = _comment(lines, node.lineno) or attributes.get(node.target.id, "")
                found[node.target.id] = ast.unparse(node.annotation), text, base
            elif isinstance(node, ast.FunctionDef) and node.returns is not None:
                doc = (ast.get_docstring(node) or "").split("\n\n")[0]
                found[node.name] = ast.unparse(node.returns), doc, base
    return found


def _keys(cls: type) -> dict[str, Key]:
    members = _members(cls)
    own = next(
        (b for b in cls.__mro__ if "to_json" in vars(b) and b.__name__ not in ("Report", "RunReport")), None
    )
    keys: dict[str, Key] = {}
    if any(base.__name__ == "RunReport" for base in cls.__mro__):
        keys["run"] = Key(
            "object", "The run and the model that the document is about: `run_id`, `model`.", is_map=True
        )
    if own is None:
        fields = [name for base, _, tree in _sources(cls) for name in _field_names(tree)]
        for name in fields:
            if not ("run" in keys and name in ("run_id", "model")):
                keys[name] = _key(cls, members, name)
        return keys
    lines, tree = next((lines, tree) for base, lines, tree in _sources(cls) if base is own)
    method = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "to_json")
    scope = _Scope({"self": cls}, lines)
    for node in ast.walk(method):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("super().to_json", "vars"):
            for name in (n for _, _, t in _sources(cls) for n in _field_names(t)):
                if not ("run" in keys and name in ("run_id", "model")):
                    keys.setdefault(name, _key(cls, members, name))
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            scope.local.setdefault(ast.unparse(target), node.value)
    for returned in (node.value for node in ast.walk(method) if isinstance(node, ast.Return)):
        for literal in _literals(returned, scope):
            scope.add(literal, "", keys)
    return keys


def _literals(node: ast.expr | None, scope: _Scope) -> list[ast.Dict]:
    """The dict literals that make up a document: in ``self.document({…})``, ``{…} | name``."""
    if isinstance(node, ast.Dict):
        return [node]
    if isinstance(node, ast.Name) and node.id in scope.local:
        return _literals(scope.local[node.id], scope)
    if isinstance(node, ast.BinOp):
        return _literals(node.left, scope) + _literals(node.right, scope)
    if isinstance(node, ast.Call):
        return [literal for argument in node.args for literal in _literals(argument, scope)]
    return []


@dataclass
class _Scope:
    """What the names in a ``to_json`` mean: objects of known classes, and local variables."""

    classes: dict[str, type]
    lines: list[str]
    local: dict[str, ast.expr] = field(default_factory=dict)

    def add(self, literal: ast.Dict, prefix: str, keys: dict[str, Key]) -> None:
        """Add the keys of a dict literal."""
        for node, value in zip(literal.keys, literal.values, strict=True):
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                continue
            name = prefix + node.value
            if name == "run" and "run" in keys:
                continue
            key = keys[name] = self.key(value)
            key.text = _plain(_comment(self.lines, node.lineno)) or key.text
            inner = self.local.get(ast.unparse(value), value)
            if isinstance(inner, ast.Dict):
                self.add(inner, f"{name}.", keys)
            elif isinstance(inner, ast.ListComp) and isinstance(inner.elt, ast.Dict):
                self.inside(inner).add(inner.elt, f"{name}[].", keys)

    def inside(self, comprehension: ast.ListComp) -> _Scope:
        loop = comprehension.generators[0]
        of = self.key(loop.iter).of
        more = {} if of is None else {ast.unparse(loop.target): of}
        return _Scope({**self.classes, **more}, self.lines, self.local)

    def key(self, value: ast.expr) -> Key:
        """The type and meaning of an expression, as far as they can be seen."""
        value = self.local.get(ast.unparse(value), value)
        if isinstance(value, ast.BoolOp):
            return self.key(value.values[-1])
        if isinstance(value, ast.IfExp):
            empty = isinstance(value.body, ast.Constant | ast.List)
            return self.key(value.orelse if empty else value.body)
        if isinstance(value, ast.BinOp):
            return self.key(value.left)
        if isinstance(value, ast.Dict):
            return Key("object")
        if isinstance(value, ast.DictComp):
            return Key(f"object of {self.key(value.value).kind or 'number or null'}", is_map=True)
        if isinstance(value, ast.ListComp):
            if isinstance(value.elt, ast.Dict):
                return Key("list of objects")
            item = self.inside(value).key(value.elt)
            return Key(f"list of {item.kind}" if item.kind else "list", "", item.of)
        if isinstance(value, ast.Subscript):
            item = self.key(value.value)
            return Key(item.kind.removeprefix("object of "), "", item.of)
        if isinstance(value, ast.Call):
            name = ast.unparse(value.func)
            if name in ("len", "sum"):
                return Key("integer")
            if name == "as_json":
                return self.key(value.args[0])
            if name == "iso":
                return Key("string or null")
            return self.key(value.func)
        root, *path = ast.unparse(value).split(".")
        cls = self.key(self.local[root]).of if root in self.local else self.classes.get(root)
        if cls is None or not path or not all(name.isidentifier() for name in path):
            return Key()
        found = Key(LINK, "", cls)
        for number, name in enumerate(path):
            members = _members(cls)
            if name == "to_json":
                return found
            if name not in members:
                return Key()
            found = _key(cls, members, name)
            if number < len(path) - 1:
                if found.of is None:
                    return Key()
                cls = found.of
        return found


def _field_names(tree: ast.ClassDef) -> list[str]:
    return [
        node.target.id
        for node in tree.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and not node.target.id.startswith("_")
        and "ClassVar" not in ast.unparse(node)
    ]


def _key(cls: type, members: dict[str, tuple[str, str, type]], name: str) -> Key:
    annotation, text, base = members[name]
    names = vars(sys.modules[base.__module__])
    kind = _kind(ast.parse(annotation, mode="eval").body, names)
    classes = [names[word] for word in re.findall(r"\w+", annotation) if is_dataclass(names.get(word))]
    reports = [one for one in classes if isinstance(one, type)]
    return Key(
        kind, _plain(text), reports[-1] if reports else None, "dict[" in annotation or annotation == "Any"
    )


def _kind(node: ast.expr, names: dict[str, Any]) -> str:
    """An annotation as words of JSON."""
    text = ast.unparse(node)
    if isinstance(node, ast.BinOp):
        return f"{_kind(node.left, names)} or {_kind(node.right, names)}"
    if isinstance(node, ast.Subscript):
        outer, inner = ast.unparse(node.value), node.slice
        parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        if outer == "Literal":
            return ", ".join(f"`{part.value}`" for part in parts if isinstance(part, ast.Constant))
        if outer in _LISTS:
            kinds = [_kind(part, names) for part in parts if ast.unparse(part) != "..."]
            return f"list of {kinds[0]}" if len(kinds) == 1 else f"[{', '.join(kinds)}]"
        if outer == "dict":
            return f"object of {_kind(parts[1], names)}"
        return "list"
    if text in _PLAIN:
        return _PLAIN[text]
    if text == "pl.DataFrame":
        return "list of objects"
    known = names.get(text)
    if isinstance(known, type) and issubclass(known, enum.Enum):
        return ", ".join(f"`{member.value}`" for member in known)
    if is_dataclass(known):
        return LINK
    if "Literal" in str(known):
        return ", ".join(f"`{value}`" for value in known.__args__)
    return {"Path": "string", "StepRange": "[integer, integer]"}.get(
        text, "list" if "Int" in text or "Float" in text else "object"
    )


# ---- real output


@contextmanager
def _in(folder: Path) -> Iterator[None]:
    here = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    """Real documents with their commands: of a small recording, and the golden ones."""
    with tempfile.TemporaryDirectory() as where, _in(Path(where)):
        write(Path("dump"), steps=24)
        np.save("loads.npy", np.arange(80, dtype=np.int64).reshape(10, 2, 4))
        for command, arguments in ARGUMENTS.items():
            result = cli(*command.split(), *arguments.format(form="json").split(), "--json")
            assert result.returncode == 0, f"{command}: {result.stderr}"
            yield command, json.loads(result.stdout)
    for path in sorted((ROOT / "tests/golden/output").glob("*.json")):
        name = path.stem.replace("export-policy", "export-placement").replace("-", " ")
        command = max((known for known in ARGUMENTS if name.startswith(known)), key=len)
        yield command, json.loads(path.read_text())


def described(real: Iterable[tuple[str, dict[str, Any]]]) -> tuple[Page, dict[str, Section]]:
    """The sections by the report classes and real documents; and those of commands."""
    page = Page()
    roots = {}
    for command in [*REPORTS, *(other for other in ARGUMENTS if other not in REPORTS)]:
        if command in REPORTS:
            module, _, name = REPORTS[command].rpartition(".")
            roots[command] = page.section(getattr(importlib.import_module(f"eplb_analyze.{module}"), name))
        else:
            roots[command] = Section(command)
    for command, document in real:
        assert document["schema_version"] == SCHEMA_VERSION, command
        values = {key: item for key, item in document.items() if key != "schema_version"}
        page.observe(roots[command], values)
    return page, roots


def sections(page: Page, roots: dict[str, Section]) -> Iterator[tuple[str, Section]]:
    """The heading of each section, in the order of the page."""
    yield from ((f"## {command}", section) for command, section in roots.items())
    own = {id(section) for section in roots.values()}
    for cls, section in sorted(page.sections.items(), key=lambda item: page.title(item[0])):
        if id(section) not in own:
            yield f"### {page.title(cls)}", section


def generate(real: Iterable[tuple[str, dict[str, Any]]]) -> str:
    """The text of docs/json.md."""
    page, roots = described(real)
    lines = [_HEAD.format(renew=RENEW, version=SCHEMA_VERSION)]
    objects = False
    for heading, section in sections(page, roots):
        if heading.startswith("###") and not objects:
            lines.append("## Objects\n\nObjects inside of these documents, by the name of their class.\n")
            objects = True
        lines += [f"{heading}\n", *page.table(section)]
    return "\n".join(lines).rstrip("\n") + "\n"


def undocumented(text: str, real: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
    """Keys of real documents that a page does not have in their section."""
    parts = re.split(r"^(##.*)$", text, flags=re.MULTILINE)
    blocks = dict(zip(parts[1::2], parts[2::2], strict=True))
    return [
        f"{heading.lstrip('# ')}: {name}"
        for heading, section in sections(*described(real))
        for name in sorted(section.seen)
        if f"| `{name}` |" not in blocks.get(heading, "")
    ]


_HEAD = """# JSON documents

<!-- Generated by `{renew}` from the report classes. Do not edit. -->

`--json` prints exactly one JSON document on stdout. Every document has the key
`schema_version`, now {version}. It goes up if a key is removed or changes its meaning. New keys can appear at
any time.

Each step has its clock time beside it, ISO 8601 in UTC: `first_time` beside `first_step`, `time` beside
`step`. It is null if the times of the run are not known. `watch` and `copy` do not have these times.

If steps of a run were thinned, a document about its steps has `retired`, a list of the ranges that it, or
some of its figures, leave out: `first_step`, `last_step` and their times, `estimated_times` (whether one of
these is interpolated, because that of its step is no longer kept), `tier` (`ranks`: tokens per EP rank are
kept, `minutes`: sums per minute, `gone`: nothing) and `reasons` (`budget`, `age`, `space`, `prune`).

A value that is not known is null. `a.b` is the key `b` of the object `a`; `a[].b` is the key `b` of each
object in the list `a`. [Metrics](metrics.md) has the formulas, [Commands](cli.md) the options.
"""


if __name__ == "__main__":
    PAGE.write_text(generate(documents()))
