"""Makes docs/images/report.png from a report in Chromium: `python -m scripts.report_picture DUMP`.

DUMP is the recording that `python -m examples.incident incident` makes.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from eplb_analyze import open_run
from eplb_analyze.report.write import write_report

IMAGE = Path(__file__).parents[1] / "docs/images/report.png"
SIZE = {"width": 1280, "height": 1325}


def main(dump: str) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "report.html"
        write_report(open_run(dump), file)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready=true]")
        page.click(".incident button")
        page.mouse.move(5, 5)
        page.wait_for_timeout(1000)  # until it has scrolled to the incident
        page.evaluate("scrollTo({top: 0, behavior: 'instant'})")
        page.wait_for_timeout(500)
        page.screenshot(path=IMAGE)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
