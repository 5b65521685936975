"""The machine's Chromium, if it has one."""

from __future__ import annotations

import os
import shutil

import pytest

_NAMES = (os.environ.get("CHROME", ""), "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, filter(None, _NAMES))), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium was found; install it (Debian, Ubuntu: apt-get install chromium) or set CHROME",
)
