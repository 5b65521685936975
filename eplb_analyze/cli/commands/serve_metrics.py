"""`serve-metrics`: a sidecar that follows a recording and answers Prometheus' scrapes."""

from __future__ import annotations

import signal
import time
from typing import Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import RunOutput, print_message
from eplb_analyze.cli.views.serve_metrics import show
from eplb_analyze.errors import UsageError
from eplb_analyze.storage.path import local


@options.about_a_run
def serve_metrics(
    out: RunOutput,
    port: Annotated[
        int, typer.Option("--port", metavar="PORT", help="Listen on this port.", min=0, max=65535)
    ] = 9464,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Listen on this address.")
    ] = "0.0.0.0",
    interval: Annotated[
        float,
        typer.Option("--interval", metavar="SECONDS", help="Read new data every SECONDS seconds.", min=0.1),
    ] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Print the metrics and exit.")] = False,
) -> None:
    """Serve a live run's balance, cost, incidents and recorder health to Prometheus.

    Follows the newest run, waits for the first one, and keeps running when a run ends. Needs
    prometheus_client: `pip install 'eplb-dump[metrics]'`.
    """
    if not once and out.json:
        raise UsageError("--json requires --once")
    folder = local(out.dump, "`serve-metrics`")
    from eplb_analyze.live.sidecar import Sidecar

    try:
        from eplb_analyze.live import prometheus
    except ModuleNotFoundError as error:
        if error.name != "prometheus_client":
            raise
        raise UsageError(
            "serve-metrics needs prometheus_client; install it with `pip install 'eplb-dump[metrics]'`"
        ) from None
    if once:
        sidecar = Sidecar(folder, out.run_id, out.model)
        report = sidecar.read_once()
        out.emit(report.to_json, lambda console: show(console, prometheus.text(report.families)))
        return
    sidecar = Sidecar(folder, out.run_id, out.model, lambda text: print_message("note", text))
    try:
        end = prometheus.serve(lambda: sidecar.families, host, port)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose others with --host and --port"
        ) from None
    print_message("note", f"serving metrics of {folder} on http://{host}:{port}/metrics")
    # Kubernetes ends a sidecar with SIGTERM.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while True:
            due = time.monotonic() + interval
            sidecar.look()
            time.sleep(max(0.0, due - time.monotonic()))
    except KeyboardInterrupt:
        pass
    end()
