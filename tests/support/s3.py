"""A client's view of the S3 server of ``s3_server.py``: what tests put there, count and break."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlencode

from pyarrow import fs


@dataclass
class S3:
    port: int

    ENVIRONMENT: ClassVar = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_EC2_METADATA_DISABLED": "true",
    }

    @classmethod
    @contextmanager
    def started(cls) -> Iterator[S3]:
        script = Path(__file__).with_name("s3_server.py")
        with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                yield cls(int(process.stdout.readline()))
            finally:
                process.kill()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def files(self) -> fs.S3FileSystem:
        return fs.S3FileSystem(
            access_key="key", secret_key="secret", region="us-east-1", endpoint_override=self.endpoint,
            allow_bucket_creation=True,
        )  # fmt: skip

    def address(self, path: str) -> str:
        """The address that the program is given for ``bucket/prefix``."""
        return f"s3://{path}?endpoint_override={self.endpoint}"

    def bucket(self) -> str:
        """A new, empty bucket."""
        name = f"b-{uuid.uuid4().hex[:12]}"
        self.files().create_dir(name)
        return name

    def put(self, folder: Path, path: str | None = None) -> str:
        """Put a folder's files there, by default into a new bucket; returns ``bucket/prefix``."""
        path = path or f"{self.bucket()}/dumps/one"
        files = self.files()
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                with files.open_output_stream(f"{path}/{file.relative_to(folder)}") as stream:
                    stream.write(file.read_bytes())
        self.count()
        return path

    def get(self, path: str) -> dict[str, bytes]:
        """All that lies below ``bucket/prefix``, by its path from there."""
        files = self.files()
        infos = files.get_file_info(fs.FileSelector(path, recursive=True))
        found = {}
        for info in infos:
            if info.type == fs.FileType.File:
                with files.open_input_stream(info.path) as stream:
                    found[info.path[len(path) + 1 :]] = stream.read()
        return found

    def count(self) -> dict[str, Any]:
        """``requests`` by kind and ``bytes`` of objects sent, since the last call."""
        return dict(json.loads(self._ask("/-/count")))

    @contextmanager
    def failing(self, **faults: object) -> Iterator[None]:
        """What goes wrong in the block; see ``Faults`` of ``s3_server.py``."""
        self._ask(f"/-/fail?{urlencode(faults)}")
        try:
            yield
        finally:
            self._ask("/-/fail?times=0")

    @contextmanager
    def strict(self) -> Iterator[None]:
        """In the block no credentials are right."""
        self._ask("/moto-api/reset-auth", b"0")
        try:
            yield
        finally:
            self._ask("/moto-api/reset-auth", b"inf")

    def _ask(self, path: str, data: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.endpoint + path, data, {"Content-Type": "text/plain"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            content: bytes = answer.read()
        return content
