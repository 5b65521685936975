"""The text the model learns and is asked about: two topics that every Python brings along. No model here.

`code` is the standard library's sources without their docstrings and comments; `prose` is those docstrings
and the language reference that `help()` shows. A byte-level model routes them through different experts.
"""

from __future__ import annotations

import ast
import importlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .errors import EngineError

Bytes = npt.NDArray[np.uint8]

TOPICS = ("code", "prose")
CORPUS_BYTES = 1_000_000
SMALLEST_CORPUS = 50_000


def read_corpora(corpus_bytes: int = CORPUS_BYTES) -> dict[str, Bytes]:
    """Both topics, at most `corpus_bytes` each; they depend on nothing but Python's version."""
    code: list[str] = []
    prose: list[str] = list(_language_reference())
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.glob("*.py")):
        code_part, prose_parts = _split_source(path)
        code.append(code_part)
        prose.extend(prose_parts)
        if min(sum(map(len, code)), sum(map(len, prose))) > corpus_bytes:
            break
    corpora = {"code": _to_bytes(code, corpus_bytes), "prose": _to_bytes(prose, corpus_bytes)}
    for topic, corpus in corpora.items():
        if len(corpus) < SMALLEST_CORPUS:
            raise EngineError(
                f"only {len(corpus)} bytes of {topic} found in {folder}: is this Python stripped of it?"
            )
    return corpora


def random_text(corpus: Bytes, length: int, rng: np.random.Generator) -> Bytes:
    """A stretch of `length` bytes from anywhere in the corpus."""
    start = int(rng.integers(0, len(corpus) - length))
    return corpus[start : start + length]


def _language_reference() -> Iterator[str]:
    try:  # some distributions ship Python without it; the docstrings then do alone
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):
        return
    for name in sorted(topics):
        yield topics[name].replace("\n   ", "\n")


def _split_source(path: Path) -> tuple[str, list[str]]:
    """A module's code without docstrings and comment lines, and its docstrings; nothing of a broken one."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return "", []
    lines = source.splitlines(keepends=True)
    docstrings = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text is None:
            continue
        if len(text) > 200:  # one-liners read like code
            docstrings.append(text)
        expression = node.body[0]
        for number in range(expression.lineno - 1, expression.end_lineno or expression.lineno):
            lines[number] = ""
    code = "".join(line for line in lines if line.strip() and not line.lstrip().startswith("#"))
    return code, docstrings


def _to_bytes(parts: list[str], corpus_bytes: int) -> Bytes:
    text = "\n\n".join(part for part in parts if part)
    return np.frombuffer(text.encode("utf-8", "replace")[:corpus_bytes], dtype=np.uint8)
