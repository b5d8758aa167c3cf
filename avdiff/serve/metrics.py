"""Prometheus metrics of a server, read from its jobs when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from avdiff.serve.jobs import COMPLETED, FAILED, QUEUED, RUNNING, JobStore


class JobCollector(Collector):
    """Counts that survive a restart, since the jobs do."""

    def __init__(self, store: JobStore) -> None:
        self.store = store

    def collect(self) -> Iterator[Metric]:
        """One pass over the database."""
        counts = self.store.counts()
        queue = GaugeMetricFamily("avdiff_jobs", "Jobs by state", labels=["state"])
        for state in (QUEUED, RUNNING, COMPLETED, FAILED):
            queue.add_metric([state], counts["status"].get(state, 0.0))
        yield queue
        failures = CounterMetricFamily("avdiff_failures", "Failed jobs by code", labels=["code"])
        for code, number in sorted(counts["code"].items()):
            failures.add_metric([code], number)
        yield failures
        stages = SummaryMetricFamily(
            "avdiff_stage_seconds", "Seconds by stage of making a clip", labels=["stage"]
        )
        for stage, seconds in sorted(counts["seconds"].items()):
            stages.add_metric([stage], counts["count"][stage], seconds)
        yield stages
        workers = GaugeMetricFamily("avdiff_ready_workers", "Workers with a loaded model")
        workers.add_metric([], float(self.store.ready_workers()))
        yield workers


def exposition(store: JobStore) -> bytes:
    """The text that Prometheus reads."""
    registry = CollectorRegistry()
    registry.register(JobCollector(store))
    return generate_latest(registry)
