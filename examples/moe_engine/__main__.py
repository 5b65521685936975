"""`python -m examples.moe_engine` in the repository, or `python path/to/examples/moe_engine` anywhere."""

import importlib
import sys
from pathlib import Path

package = __package__
if not package:  # run as a folder: its parent makes it a package, the repository's root has eplb_dump
    folder = Path(__file__).resolve().parent
    package = folder.name
    sys.path[0] = str(folder.parent)
    sys.path.append(str(folder.parent.parent))

if __name__ == "__main__":
    sys.exit(importlib.import_module(f"{package}.cli").main())
