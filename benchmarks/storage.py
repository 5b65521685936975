"""What reading a dump from a bucket takes: requests, bytes and time, beside other readers of the same files.

    python -m benchmarks.storage [--steps 6144] [--delay 0.0]

Makes a run of DeepSeek-V3's shape, scope global, and serves it with moto's S3 server on this machine;
``--delay`` seconds pass before each answer. The peers find one step of one layer by the statistics in the
footers, and read ``rank_load`` of all files; s3fs is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))

from s3 import S3

from benchmarks.analyze import make

COMMANDS = (("layer", "12", "--step", "400"), ("summary",), ("experts",))
PEERS = ("pyarrow", "s3fs, readahead", "s3fs, none", "polars")
LAYER, STEP = 12, 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6144)
    parser.add_argument("--delay", type=float, default=0.0)
    arguments = parser.parse_args()
    os.environ.update(S3.ENVIRONMENT)
    with tempfile.TemporaryDirectory() as folder, S3.started() as s3:
        make(Path(folder), arguments.steps)
        path = s3.put(Path(folder))
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        print(f"{arguments.steps:,} steps, {size / 1e6:.1f} MB")
        with s3.failing(delay=arguments.delay) if arguments.delay else nullcontext():
            for command in COMMANDS:
                name = " ".join(command)
                measured(s3, f"local: {name}", lambda c=command: program(*c, folder))  # type: ignore[misc]
                measured(s3, name, lambda c=command: program(*c, s3.address(path)))  # type: ignore[misc]
            for peer in PEERS:
                if peer.startswith("s3fs") and importlib.util.find_spec("s3fs") is None:
                    continue
                for column in ("load", "rank_load"):
                    measured(s3, f"{peer}: {column}", lambda p=peer, c=column: read(s3, path, p, c))  # type: ignore[misc]


def measured(s3: S3, name: str, work: Callable[[], object]) -> None:
    s3.count()
    begun = time.perf_counter()
    work()
    seconds = time.perf_counter() - begun
    counted = s3.count()
    requests = sum(counted["requests"].values())
    print(f"{name:40} {requests:6,} requests {counted['bytes'] / 1e6:8.1f} MB {seconds:6.2f} s", flush=True)


def program(*arguments: str) -> None:
    command = [str(Path(sys.executable).with_name("eplb-analyze")), *arguments]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def read(s3: S3, path: str, peer: str, column: str) -> int:
    """Rows read: of one step and layer where ``column`` is ``load``, else all."""
    columns = ["step", "layer", column]
    if peer == "polars":
        import polars as pl

        options = {"aws_endpoint_url": s3.endpoint, "aws_region": "us-east-1", "aws_allow_http": "true"}
        frame = pl.scan_parquet(f"s3://{path}/**/loads-*.parquet", storage_options=options).select(columns)
        if column == "load":
            frame = frame.filter((pl.col("layer") == LAYER) & (pl.col("step") == STEP))
        return frame.collect().height
    names, opened = files(s3, path, peer)
    return sum(rows(opened(name), columns, one=column == "load") for name in names)


def files(s3: S3, path: str, peer: str) -> tuple[list[str], Callable[[str], Any]]:
    if peer == "pyarrow":
        from pyarrow import fs

        arrow = s3.files()
        found = [info.path for info in arrow.get_file_info(fs.FileSelector(path, recursive=True))]
        return [name for name in found if "/loads-" in name], arrow.open_input_file
    import s3fs

    system = s3fs.S3FileSystem(
        endpoint_url=s3.endpoint, client_kwargs={"region_name": "us-east-1"},
        default_cache_type=peer.split(", ")[1], skip_instance_cache=True,
    )  # fmt: skip
    return [name for name in system.find(path) if "/loads-" in name], system.open


def rows(source: Any, columns: list[str], *, one: bool) -> int:
    import pyarrow.parquet as pq

    count = 0
    with source, pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=True) as file:
        for group in range(file.metadata.num_row_groups):
            step, layer = (file.metadata.row_group(group).column(i).statistics for i in (0, 1))
            if not one or (step.min <= STEP <= step.max and layer.min <= LAYER <= layer.max):
                count += file.read_row_group(group, columns=columns, use_threads=False).num_rows
    return count


if __name__ == "__main__":
    main()
