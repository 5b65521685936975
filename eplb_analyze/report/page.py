"""The page: the template of ``assets`` with the document, scripts and styles in it; nothing is fetched.

Text from a dump is untrusted. The page holds it as JSON only, in which no tag can end or begin, and scripts
insert it as text, never as markup. The content security policy allows the page's own scripts, by their
hashes, and nothing else: no requests.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from typing import Any

from eplb_analyze.json_report import as_json

#: In execution order; docs/investigate/report.md gives the source of the first.
SCRIPTS = ("echarts.min.js", "loads.js", "charts.js", "page.js")


def page(document: dict[str, Any]) -> bytes:
    """The HTML file of a document (:mod:`eplb_analyze.report.document`)."""
    scripts = [_asset(name) for name in SCRIPTS]
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    values = {
        "POLICY": policy,
        "TITLE": html.escape(str(document["title"])),
        "STYLE": _asset("style.css"),
        "DATA": _inert(document),
        "SCRIPTS": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    parts = _asset("page.html").split("%%")
    # Every second part is a name, so nothing that was put in is looked at again.
    return "".join(values[part] if i % 2 else part for i, part in enumerate(parts)).encode()


def _asset(name: str) -> str:
    return (files("eplb_analyze.report") / "assets" / name).read_text("utf-8")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def _inert(document: dict[str, Any]) -> str:
    """JSON that can stand in a script element: no tag, comment or entity in it."""
    text = json.dumps(as_json(document), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
