"""Metrics in Prometheus' text format, as text and over HTTP, by its Python client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from eplb_analyze.live.metric_families import Family


def text(families: Sequence[Family]) -> str:
    """The families in the text format."""
    registry = CollectorRegistry()
    registry.register(_Families(lambda: families))
    return generate_latest(registry).decode()


def serve(families: Callable[[], Sequence[Family]], host: str, port: int) -> Callable[[], None]:
    """Answer scrapes in a thread of its own; returns what ends that. Raises OSError.

    The processor time and memory of this process are among the metrics (``process_…``).
    """
    registry = CollectorRegistry()
    registry.register(_Families(families))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    server, thread = start_http_server(port, host, registry)

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return end


class _Families(Collector):
    def __init__(self, families: Callable[[], Sequence[Family]]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families():
            yield _metric(family)


def _metric(family: Family) -> Metric:
    labels = list(family.samples[0].labels) if family.samples else []
    name = family.name.removesuffix("_total") if family.kind == "counter" else family.name
    if family.kind == "summary":
        summary = SummaryMetricFamily(name, family.help, labels=labels)
        for sample in family.samples:
            summary.add_metric([*sample.labels.values()], sample.count or 0, sample.value)
        return summary
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = kind(name, family.help, labels=labels)
    for sample in family.samples:
        metric.add_metric([*sample.labels.values()], sample.value)
    return metric
