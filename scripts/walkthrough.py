"""Renews the output of the commands in docs/investigate/incident.md: `python -m scripts.walkthrough`.

The `text` block after a `sh` block is what its command prints. If it ends with a line `...`, the page
shows only as many of the first lines as before.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/investigate/incident.md"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "examples.incident", f"{folder}/incident"], check=True)

        def renewed(block: re.Match[str]) -> str:
            command, shown = block["command"], block["output"].splitlines()
            result = subprocess.run(
                shlex.split(command), cwd=folder, capture_output=True, text=True, check=True, timeout=600
            )
            printed = result.stdout.rstrip().splitlines()
            if shown and shown[-1] == "...":
                printed = [*printed[: len(shown) - 1], "..."]
            return f"```sh\n{command}\n```\n\n```text\n{chr(10).join(printed)}\n```"

        pattern = r"```sh\n(?P<command>eplb-analyze [^\n]*)\n```\n\n```text\n(?P<output>.*?)\n?```"
        PAGE.write_text(re.sub(pattern, renewed, PAGE.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
