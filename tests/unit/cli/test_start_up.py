"""What a command imports: half of a small command's time, if it imported all."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import folder_with_pandas, run_child, write

#: What no command about a run needs to print its answer.
NEVER = ["pydantic", "polars", "torch", "pandas", "importlib.metadata", "pyarrow.compute", "pyarrow.dataset"]
COST = ["eplb_analyze.analysis.cost", "eplb_analyze.analysis.summary_report"]
MINUTES = ["eplb_analyze.analysis.minute_sums"]
SCRIPT = """
    import contextlib, io, sys
    sys.path.insert(0, sys.argv.pop(2))
    from eplb_analyze.cli.app import main
    sys.argv = ["eplb-analyze", *sys.argv[2:], sys.argv[1]]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main()
    print(*sorted(sys.modules))
"""


@pytest.mark.parametrize(
    ("command", "forbidden"),
    [
        (["summary"], MINUTES),
        (["layer", "1", "--step", "4"], [*COST, *MINUTES, "concurrent.futures", "numpy.ma"]),
        (["timeline"], MINUTES),
        (["rearrangements"], MINUTES),
        (["report", "--output", "FILE"], MINUTES),
    ],
    ids=lambda value: value[0],
)
def test_command_imports_only_what_it_uses(command: list[str], forbidden: list[str], tmp_path: Path) -> None:
    write(tmp_path / "dump", ranks=1, scope="global")
    command = [str(tmp_path / "report.html") if word == "FILE" else word for word in command]
    imported = run_child(SCRIPT, tmp_path / "dump", folder_with_pandas(tmp_path), *command).split()
    assert "eplb_analyze.reader.run" in imported
    commands = "eplb_analyze.cli.commands"
    assert [name for name in imported if name.startswith(f"{commands}.")] == [f"{commands}.{command[0]}"]
    assert sorted({*NEVER, *forbidden} & {*imported}) == []
