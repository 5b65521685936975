"""The commands that results and notes recommend can be pasted as they are."""

from __future__ import annotations

import json
import shlex
import zoneinfo
from pathlib import Path

import pytest
from helpers import EP_SIZE, LAYERS, LOGICAL, SLOTS, cli, map_of, one_error
from numpy import ones

from eplb_analyze.cli.output import RunOutput
from eplb_analyze.text import command_line
from eplb_dump import ExpertLoadWriter


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of a dump whose name needs quotes: rank 0 gets seven times the tokens of rank 1."""
    dump = tmp_path_factory.mktemp("dumps") / "it's here"
    for run in ("first", "second"):
        with ExpertLoadWriter(
            dump, model="m", run_id=run, num_logical_experts=LOGICAL, ep_size=EP_SIZE, scope="global"
        ) as writer:
            for step in range(40):
                load = ones((LAYERS, SLOTS), int)
                load[:, : SLOTS // EP_SIZE] *= 7 + step % 2
                load[1, 0] += 20
                writer.record(step, load, map_of(step // 20), phase="decode")
    return dump


def next_commands(output: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in output.splitlines() if line.split()[:1] == ["next"]]


def pasted(command: str) -> list[str]:
    program, *words = shlex.split(command)
    assert program == "eplb-analyze"
    return words


def test_next_command_of_a_summary_runs_as_printed(dump: Path) -> None:
    found = cli("summary", "--run", "fi", dump)
    assert "IMBALANCED" in found.stdout
    (command, *_) = next_commands(found.stdout)
    assert command == f"eplb-analyze advise --run fi {shlex.quote(str(dump))}"
    assert "run first" in cli(*pasted(command)).stdout


def test_imbalanced_summary_names_the_worst_layers_and_ranks(dump: Path) -> None:
    out = cli("summary", dump).stdout
    lines = out.splitlines()
    (layers,) = (line for line in lines if line.startswith("  layers"))
    assert layers.startswith("  layers  least balanced: 1 (balancedness 0.5")
    ranks = "ranks the others wait for rank 0 (100% of the excess tokens: those above the mean rank's) next"
    assert ranks in " ".join(out.split())


def test_dump_that_the_environment_or_the_folder_names_is_left_out(
    dump: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given in ([], [dump]):
        found = cli("summary", *given, env={"EXPERT_LOAD_DUMP_DIR": str(dump)})
        assert next_commands(found.stdout)[0] == "eplb-analyze advise"
    monkeypatch.chdir(dump)
    assert next_commands(cli("summary").stdout)[0] == "eplb-analyze advise"
    monkeypatch.chdir(dump.parent)
    relative = next_commands(cli("summary", dump.name).stdout)[0]
    assert relative == f"eplb-analyze advise {shlex.quote(dump.name)}"


def test_note_on_several_runs_has_a_command_that_lists_them(dump: Path) -> None:
    note = cli("summary", dump).stderr
    command = note.split("`")[1]
    assert "2 runs" in cli(*pasted(command)).stdout


def test_command_about_steps_keeps_the_time_zone(dump: Path) -> None:
    out = RunOutput(dump, None, None)
    out.zone = zoneinfo.ZoneInfo("Europe/Berlin")
    assert out.paste("layer 1 --steps 2-7") == "eplb-analyze layer 1 --steps 2-7 --tz Europe/Berlin"
    assert out.paste("check") == "eplb-analyze check"


def test_steps_of_a_phase_are_shown_of_that_phase(dump: Path) -> None:
    out = RunOutput(dump, None, None)
    out.phase = "decode"
    assert out.paste("layer 1 --steps 3-5") == "eplb-analyze layer 1 --steps 3-5 --phase decode"
    assert out.paste("check") == "eplb-analyze check"


def test_command_line_quotes_what_a_shell_would_split() -> None:
    assert command_line("check") == "eplb-analyze check"
    line = command_line("layer 1", "-a b", run="r 1", model="m")
    assert shlex.split(line) == ["eplb-analyze", "layer", "1", "--run", "r 1", "--model", "m", "./-a b"]


def test_layer_and_dump_in_the_wrong_order_are_shown_in_the_right_one(dump: Path) -> None:
    wrong = cli("layer", "--top", "3", dump, "1")
    one_error(wrong, 2, "is not a number; the layer comes first, then the dump")
    corrected = wrong.stderr.split("`")[1]
    assert pasted(corrected) == ["layer", "--top", "3", "1", str(dump)]
    assert cli(*pasted(corrected)).returncode == 0
    one_error(cli("layer", "twelve", dump), 2, "'twelve' is not a number", "`eplb-analyze layer LAYER DUMP`")


def test_missing_option_lists_its_choices_in_one_line() -> None:
    one_error(cli("export", "loads", "-o", "x"), 2, "Choose from: csv, parquet, logical-npy")


def test_error_about_a_folder_without_a_run_names_dumps_below_it(dump: Path, tmp_path: Path) -> None:
    one_error(cli("summary", dump.parent), 3, f"these folders in it are dumps: {dump}")
    one_error(cli("summary", tmp_path), 3, "no run in it", "did it run a step?")


def test_postmortem_recommends_the_summary_of_the_costliest_run(dump: Path) -> None:
    (command,) = next_commands(cli("postmortem", dump.parent).stdout)
    first = cli("postmortem", "--json", dump.parent).stdout
    costliest = json.loads(first)["runs"][0]["run_id"]
    assert f"run {costliest}\n" in cli(*pasted(command)).stdout
