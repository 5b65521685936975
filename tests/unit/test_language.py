"""The project's text is plain American English: these words must not come back.

Checked are the names, comments and docstrings of every Python file, the strings of both packages (help and
messages among them), and the paragraphs of every other text file.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tokenize
from collections.abc import Iterator

import pytest
from helpers import ROOT

#: Pattern -> what to write instead.
REPLACE = {
    r"anew": "again",
    r"mend(s|ed|ing)?": "fix",
    r"(is |are |was )?laid at": "attributed to",
    r"of ours": "our, this project's, or leave it out",
    r"(who|what) is where": "placement",
    r"has come to": "is, reached",
    r"of which there (are|is)": "name the number",
    r"that (is|are) none": "name the subject",
    r"(is|are|was) none of ours": "is foreign",
    r"taken for granted": "assumed",
    r"beyond chance": "statistically significant",
    r"whatever idles": "lower bound for any placement",
    r"no placement whatever": "lower bound for any placement",
    r"map of the house": "architecture",
    r"as always": "as usual",
    r"what lasts": "persistent imbalance",
    r"not in order": "problems found",
    r"at (its|the) door": "attributed to",
    r"(give|gives|gave) way to": "is replaced by, yields to",
    r"so much as": "even",
    r"it (is|was) told": "the caller passes, the message says",
    r"tells? (of|apart|them apart)": "reports, distinguishes",
    r"says? of (it|them|itself)": "states",
    r"by and by": "gradually",
    r"records (it|them) and tells": "records every step and explains it",
    r"what was (flushed|written) survives": "name the subject: flushed data survives",
    r"says? the rest": "see",
    r"inside is not what": "the engine's internals do not match a supported version",
    r"is not known to the plugin": "is not supported",
    r"stands? (what|beside|in order|in the (file|page|run))": "comes first, is shown",
    r"in capitals at the top": "critical warnings come first, in capitals",
    r"who is to": "target",
    r"make a run of ours": "convert into a run",
    r"bring (a|the) run": "copy a run",
    r"how does a run stand": "show a live view of a run",
    r"killed writers left": "recover recordings from crashed writers",
    r"leave the load balancer as it is": "recommend load-balancer settings",
    r"foremost": "the rank with the newest step",
    r"(go|goes|went|going) on where (it|they) (was|were)": "continue",
    r"files? of strangers": "untrusted files",
    r"a stranger's": "untrusted",
    r"ended? in order|in order ended": "was closed, ended normally",
    r"(take|takes|taken|took) (it |them )?for a whole": "complete",
    r"is (of|from) a later version": "name the subject and the version",
    r"chance within (a|such) steps?": "random variation from step to step",
    r"(cannot|could not|can not) be had": "is not available",
    r"so it is with": "the same applies to",
    r"not merely": "only",
    r"(do|does) not divide (among|into)": "cannot be divided evenly among",
    r"engines? goe?s? on": "the engine continues",
    r"(is|are) of another": "belongs to another, differs from",
    r"comes? twice": "occurs twice",
    r"exit code \d where": "the exit code is N if",
    r"runs? (it|they) (was|were) made of": "the original run",
    r"impossible experts?": "invalid expert numbers",
    r"ill(y)? formed": "malformed",
    r"analys(e|es|ed|ing)": "analyze",
    r"(behaviour|colour|favour|honour|neighbour|labour)\w*": "the American spelling",
    r"licen[c]e[sd]?": "license",
    r"(cent|met|fib)re": "the American spelling",
    r"(serial|normal|initial|recogn|organ|summar|real|util|minim|maxim|optim)is(e|es|ed|ing|ation)": "-ize",
    r"(cancell|labell|modell|travell)(ed|ing)": "one l",
}
WORDS = re.compile("|".join(rf"(?<![\w-])(?:{pattern})(?![\w-])" for pattern in REPLACE), re.IGNORECASE)

#: This file holds the list.
THIS = "tests/unit/test_language.py"


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def python_files() -> list[str]:
    return [name for name in tracked() if name.endswith(".py") and (ROOT / name).exists() and name != THIS]


def text_files() -> list[str]:
    kinds = (".md", ".sh", ".toml", ".yml", ".yaml", ".js", ".css", ".html")
    names = [n for n in tracked() if n.endswith(kinds) or n == ".ci/run"]
    return [n for n in names if ".min." not in n and (ROOT / n).exists()]


def prose(path: str) -> Iterator[tuple[int, str]]:
    """Line and text of the comments, docstrings and names of a Python file."""
    source = (ROOT / path).read_text()
    with (ROOT / path).open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name.replace("_", " ")


def strings(path: str) -> Iterator[tuple[int, str]]:
    """Line and text of the strings of a Python file, as help and messages are."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def paragraphs(path: str) -> Iterator[tuple[int, str]]:
    """Line and text of the paragraphs of a text file, so that a phrase is found across lines."""
    start, lines = 1, []
    for number, line in enumerate([*(ROOT / path).read_text().splitlines(), ""], 1):
        if line.strip():
            lines.append(line)
            continue
        yield start, " ".join(lines)
        start, lines = number + 1, []


def slips(lines: Iterator[tuple[int, str]]) -> list[str]:
    found = []
    for number, text in lines:
        joined = " ".join(text.split())
        found += [f"line {number}: {match[0]!r} in {joined[:80]!r}" for match in WORDS.finditer(joined)]
    return found


@pytest.mark.parametrize("path", python_files())
def test_comments_docstrings_and_names_are_plain_english(path: str) -> None:
    assert slips(prose(path)) == []


@pytest.mark.parametrize("path", [p for p in python_files() if p.startswith(("eplb_dump/", "eplb_analyze/"))])
def test_help_and_messages_are_plain_english(path: str) -> None:
    assert slips(strings(path)) == []


@pytest.mark.parametrize("path", text_files())
def test_text_file_is_plain_english(path: str) -> None:
    assert slips(paragraphs(path)) == []


def test_list_finds_its_own_words() -> None:
    sample = [(1, "Mended anew, of which there are two; an analysed colour laid at its door.")]
    assert len(slips(iter(sample))) == 6
    assert slips(iter([(1, "Commend the amendment; renew the recommendation.")])) == []
