"""An S3 server for tests: moto's, in a process of its own, which counts what it sends and fails on request.

    python tests/support/s3_server.py [--auth]

prints its port. Beside S3's own paths it has ``/-/count``: requests and bytes since the last look, and
``/-/fail?…``: what goes wrong from then on (see :class:`Faults`).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs


@dataclass
class Faults:
    """What goes wrong with requests for objects whose key contains ``key``.

    ``delay``: seconds before an answer; ``status``: answer with this instead; ``cut``: send so many bytes
    of an object and close the connection; ``times``: for so many requests, then all is well; ``method``:
    of these requests only.
    """

    key: str = ""
    method: str = ""
    delay: float = 0.0
    status: int = 0
    cut: int = -1
    times: int = 1 << 30


class Watched:
    """The server's application, with everything that passes counted."""

    def __init__(self, application: Any) -> None:
        self._application = application
        self._lock = threading.Lock()
        self._faults = Faults()
        self._requests: Counter[str] = Counter()
        self._bytes = 0

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path, query = environ["PATH_INFO"], parse_qs(environ["QUERY_STRING"])
        if path == "/-/count":
            with self._lock:
                answer = {"requests": dict(self._requests), "bytes": self._bytes}
                self._requests, self._bytes = Counter(), 0
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(answer).encode()]
        if path == "/-/fail":
            kinds = {"key": str, "method": str, "delay": float, "status": int, "cut": int, "times": int}
            self._faults = Faults(**{name: kinds[name](value[0]) for name, value in query.items()})
            start_response("200 OK", [])
            return [b""]
        return self._answer(environ, start_response)

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        kind = "LIST" if method == "GET" and "list-type" in environ["QUERY_STRING"] else method
        faults = self._struck(path + environ["QUERY_STRING"], kind)
        with self._lock:
            self._requests[kind] += 1
        if faults is not None:
            time.sleep(faults.delay)
            if faults.status:
                start_response(f"{faults.status} Because", [("Content-Length", "0")])
                return [b""]
        body = b"".join(self._application(environ, start_response))
        if kind == "GET":
            with self._lock:
                self._bytes += len(body)
            if faults is not None and 0 <= faults.cut < len(body):
                return [body[: faults.cut]]  # shorter than the header promised
        return [body]

    def _struck(self, path: str, kind: str) -> Faults | None:
        faults = self._faults
        with self._lock:
            if faults.key not in path or faults.method not in kind or faults.times <= 0:
                return None
            faults.times -= 1
        return faults


def main() -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: Any) -> None:
            pass

    application = Watched(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
