"""Help: commands in groups, verbs first, no internal types, correct at 80 columns, and examples that run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clocks import START_NS, steady_clock
from helpers import cli, one_error, write
from typer.main import get_command

from eplb_analyze.cli.app import program
from eplb_analyze.cli.help import examples_of
from eplb_analyze.dispatch.named import LP, NAMES

#: With what a help text may begin.
VERBS = {
    "Compare", "Convert", "Copy", "Limit", "Explain", "List", "Merge", "Plot", "Rank", "Recommend", "Recover",
    "Replay", "Serve", "Show", "Verify", "Write",
}  # fmt: skip
GROUPS = ["Look", "Drill down", "Decide", "Many runs", "Data", "Reference"]


def commands(command: Any = None, name: str = "") -> dict[str, Any]:
    """All commands, with those of their groups: ``export placement``."""
    group = getattr(command or get_command(program()), "commands", None)
    if group is None:
        return {name: command}
    found: dict[str, Any] = {}
    for key, below in group.items():
        found |= commands(below, f"{name} {key}".strip())
    return found


COMMANDS = commands()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    night = START_NS + 17_310 * 10**9  # the run is from 03:02:10 to 03:06:00
    with steady_clock(10_000, night):
        write(folder / "dump", steps=24)
    write(folder / "old-dump", steps=24, run_id="old")
    np.save(folder / "load.npy", np.array([[30, 10, 20, 40], [25, 25, 25, 25]]))
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_in_the_help_of_a_command_run(
    name: str, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = examples_of(COMMANDS[name].epilog)
    assert len(lines) == 2
    for number, line in enumerate(lines):
        folder = shutil.copytree(recorded, tmp_path / str(number))
        monkeypatch.chdir(folder)
        program, *words = shlex.split(line)
        assert program == "eplb-analyze"
        assert " ".join(words).startswith(name)
        result = cli(*words)
        assert result.returncode == 0, result.stderr
        if "--json" in words:
            json.loads(result.stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_is_for_readers(name: str) -> None:
    result = cli(*name.split(), "--help")
    assert (result.returncode, result.stderr) == (0, "")
    text = result.stdout.split("\n\n")[1]
    assert text.split()[0] in VERBS
    assert COMMANDS[name].short_help.split()[0] in VERBS
    assert [line for line in result.stdout.splitlines() if len(line) > 80] == []
    assert "\x1b" not in result.stdout
    # What stands between < and > are choices, not the name of a type.
    assert all("|" in found for found in re.findall(r"<([\w\[\]|.-]+)>", result.stdout))
    assert not re.search(r"\b(int|str|float|Path|StoragePath)\b", result.stdout)
    for example in examples_of(COMMANDS[name].epilog):
        assert f"\n  {example}\n" in result.stdout


def test_commands_are_listed_in_groups() -> None:
    text = cli("--help").stdout
    headings = re.findall(r"^([A-Z][a-z ]+):$", text, re.MULTILINE)
    assert [heading for heading in headings if heading in GROUPS] == GROUPS
    listed = re.findall(r"^  ([a-z-]+) +[A-Z]", text[text.index("Look:") :], re.MULTILINE)
    assert set(listed) == {name.split()[0] for name in COMMANDS}
    assert all(len(line) <= 80 for line in text.splitlines())


def test_wrong_usage_is_one_error_that_names_the_help() -> None:
    one_error(cli("summary", "--nonsense"), 2, "--nonsense", "see `eplb-analyze summary --help`")
    one_error(cli("nonsense"), 2, "nonsense", "see `eplb-analyze --help`")
    one_error(cli("summary", "--sinse", "03:12"), 2, "No such option: --sinse", "--since")
    assert "Possible" not in cli("layer", "1", "--rank", "30").stderr
    one_error(cli("layer"), 2, "LAYER", "see `eplb-analyze layer --help`")


def test_error_says_what_to_write_instead(recorded: Path) -> None:
    dump = str(recorded / "dump")
    one_error(cli(dump), 2, f"`eplb-analyze summary {dump}`")
    one_error(cli("report", dump), 2, f"`eplb-analyze report {dump} -o report.html`")
    one_error(cli("compare", "0-9", "10-19", dump), 2, "ranges of steps go in --steps-a and --steps-b")
    one_error(cli("summary", "--step", "2-7", dump), 2, "write --steps 2-7")
    one_error(cli("summary", "--run", "ld", recorded / "old-dump"), 2, "no run 'ld'; did you mean old?")
    one_error(cli("summary", "--run", "zz", recorded / "old-dump"), 2, "no run 'zz'; its runs are: old;")


def test_option_has_one_meaning_in_all_commands() -> None:
    """An option's value has one name wherever it is taken; a list of settings has ``N,N…`` for ``N``."""
    values: dict[str, set[str]] = {}
    for command in COMMANDS.values():
        for param in command.params:
            for option in param.opts:
                if option.startswith("--"):
                    value = "flag" if getattr(param, "is_flag", False) else str(param.metavar)
                    values.setdefault(option, set()).add(value.replace("N,N…", "N").replace("A,B…", "NAME"))
    assert {option: found for option, found in values.items() if len(found) > 1} == {}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_of_commands_works(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "_EPLB_ANALYZE_COMPLETE": f"complete_{shell}", "COMP_WORDS": "eplb-analyze rea", "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "eplb-analyze rea", "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }  # fmt: skip
    result = cli(env=variables)
    assert "rearrangements" in result.stdout
    assert "summary" not in result.stdout


def test_dispatches_are_named() -> None:
    for command, names in (("replay", NAMES), ("advise", [name for name in NAMES if name != LP])):
        (option,) = [param for param in COMMANDS[command].params if "--dispatch" in param.opts]
        words = re.findall(r"[a-z-]+", getattr(option, "help", ""))
        assert [word for word in words if word in NAMES] == list(names)
