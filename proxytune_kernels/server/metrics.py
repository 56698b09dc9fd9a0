"""What the server tells Prometheus, in a registry of its own: a process may have several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from proxytune_kernels.decoder import RequestOutput

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counts, gauges and times of one server.

    Args:
        slots: of the decoder.
        statistics: the decoder's own counts, by name.
        pid: of the decoder's process; None where it is this one.
    """

    def __init__(
        self, slots: int, statistics: Callable[[], Mapping[str, int]], pid: int | None = None
    ) -> None:
        self._registry = registry = CollectorRegistry()
        self._responses = Counter(
            "proxytune_responses", "HTTP responses.", ("path", "status"), registry=registry
        )
        self._requests = Counter(
            "proxytune_requests", "Outputs that ended, by why.", ("reason",), registry=registry
        )
        self._prompt_tokens = Counter(
            "proxytune_prompt_tokens", "Tokens of the base's prompts.", registry=registry
        )
        self._tokens = Counter("proxytune_tokens", "Output tokens.", registry=registry)
        Gauge("proxytune_slots", "Slots there are.", registry=registry).set(slots)
        self._running = Gauge("proxytune_slots_in_use", "Slots in use.", registry=registry)
        self._waiting = Gauge("proxytune_queue", "Outputs that wait for a slot.", registry=registry)
        times = {
            name: Histogram(f"proxytune_{name}_seconds", text, buckets=_SECONDS, registry=registry)
            for name, text in {
                "queue": "Until a slot was free.",
                "time_to_first_token": "From the request to its first token.",
                "time_between_tokens": "From one token of an output to its next.",
                "request": "From the request to its end.",
            }.items()
        }
        self._queued, self._first = times["queue"], times["time_to_first_token"]
        self._between, self._whole = times["time_between_tokens"], times["request"]
        registry.register(_DecoderCounts(statistics))
        ProcessCollector(registry=registry)
        if pid is not None:
            ProcessCollector("proxytune_decoder", lambda: pid, registry=registry)

    def response(self, path: str, status: int) -> None:
        """Count a response."""
        self._responses.labels(path, str(status)).inc()

    def occupied(self, running: int, waiting: int) -> None:
        """Say how full the decoder is."""
        self._running.set(running)
        self._waiting.set(waiting)

    def tokens(self, count: int, seconds: float | None) -> None:
        """Count an output's new tokens, ``seconds`` after those before; None: the first ones."""
        self._tokens.inc(count)
        if seconds is not None:
            for _ in range(count):
                self._between.observe(seconds / count)

    def ended(self, output: RequestOutput) -> None:
        """Count an output that has ended."""
        self._requests.labels(output.finish_reason).inc()
        self._prompt_tokens.inc(len(output.prompt_token_ids["base"]))
        self._queued.observe(output.metrics.queued)
        self._whole.observe(output.metrics.total)
        if output.token_ids:
            self._first.observe(output.metrics.first_token)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class _DecoderCounts(Collector):
    def __init__(self, statistics: Callable[[], Mapping[str, int]]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        counts = self._statistics()
        for name, count in counts.items():
            yield CounterMetricFamily(
                f"proxytune_decoder_{name}", "As in Decoder.statistics().", value=count
            )
        yield GaugeMetricFamily(
            "proxytune_acceptance",
            "Share of the drafts that were accepted; 0 where nothing was drafted.",
            value=counts["accepted"] / max(counts["drafted"], 1),
        )
