"""Executes examples/incident.ipynb and stores it with its outputs: `python -m scripts.notebook [OUT]`.

OUT is by default the notebook itself. It runs in a folder of its own, beside a copy of the example that makes
its recording. What differs from run to run (times, counts of executions, the machine's Python) is not stored.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "incident.ipynb"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def main() -> None:
    import nbformat

    out = Path(sys.argv[1]) if len(sys.argv) > 1 else NOTEBOOK
    nbformat.write(executed(nbformat.read(NOTEBOOK, 4)), out)


def executed(notebook: Any) -> Any:
    """The notebook with the outputs of running all its cells; the first error ends it."""
    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(EXAMPLES / "incident.py", folder)
        notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
        kernel = AsyncKernelManager(transport="ipc", ip=f"{folder}/kernel")
        client = NotebookClient(
            notebook, kernel, timeout=600, resources={"metadata": {"path": folder}}, record_timing=False
        )
        client.execute()
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell["metadata"] = {}
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if len(data) > 1:  # the repr of a report or a picture
                del data["text/plain"]
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    return notebook


if __name__ == "__main__":
    main()
