"""Renews the output of the commands in docs/investigate/incident.md: `python -m scripts.walkthrough`.

The `text` block after a `sh` block is what its command prints. If it ends with a line `...`, the page
shows only as many of the first lines as before.
"""

from __future__ import annotations

import re
import shlex

from scripts.terminal import ROOT, planted_incident, printed

PAGE = ROOT / "docs/investigate/incident.md"


def main() -> None:
    with planted_incident() as folder:

        def renewed(block: re.Match[str]) -> str:
            command, shown = block["command"], block["output"].splitlines()
            lines = printed(shlex.split(command)[1:], folder).rstrip().splitlines()
            if shown and shown[-1] == "...":
                lines = [*lines[: len(shown) - 1], "..."]
            return f"```sh\n{command}\n```\n\n```text\n{chr(10).join(lines)}\n```"

        pattern = r"```sh\n(?P<command>eplb-analyze [^\n]*)\n```\n\n```text\n(?P<output>.*?)\n?```"
        PAGE.write_text(re.sub(pattern, renewed, PAGE.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
